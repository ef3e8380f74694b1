"""Pre-training of V-MoE S/32 on JFT-style data, as in the paper.

    vmoe train --config jft_s32 --workdir runs/jft_s32
    vmoe train --config jft_s32 --dry-run    # on a laptop, without the data

JFT-300M is private: about 300 million images, 18,291 classes, several labels an image. Replace
`tfds:./data/jft` by a data set of your own: vmoe/data/sources/__init__.py lists the forms that it
may have, and `python -m scripts.prepare.folder --whole FOLDER data/jft` makes this one, in one
split, from a folder per class. A batch of 4,096 images needs several devices; see `vmoe plan`. It
has not been trained here; the accuracies in the paper are on JFT-300M and after fine-tuning, and
depend on that data.

From the paper (arXiv 2106.05974) and the authors' code: the model, 32 experts with k = 2, batch
size, peak and final learning rate, warmup, weight decay of 0.1 on all parameters, the head's bias,
no clipping (a global norm of 10 for H/14). Numbers that no source gives are ours: the number of
epochs, the held-out images, inception crops and flips without further augmentation, the batch size
of evaluations, the number of workers, and how often metrics, evaluations and checkpoints are
written.
"""

import math

from vmoe.config import (
    DataConfig,
    EvalConfig,
    OptimConfig,
    Preprocessing,
    PreprocessingConfig,
    TrainConfig,
    WeightDecayConfig,
)
from vmoe.models import model_config

NUM_CLASSES = 18_291

config = TrainConfig(
    model=model_config(
        "vmoe_s32_every2_e32",
        num_classes=NUM_CLASSES,
        head_bias=-math.log(NUM_CLASSES),
        moe=dict(exchange=dict(dtype="bfloat16")),
    ),
    data=DataConfig(
        "tfds:./data/jft:train[16384:]",
        preprocessing=PreprocessingConfig("tf_bilinear", exif=False),
        crop_min_area=0.05,
        flip=True,
    ),
    optim=OptimConfig(
        lr=1e-3,
        schedule="linear",
        end_lr=1e-5,
        warmup_steps=10_000,
        weight_decay=WeightDecayConfig(kernels=0.1, others=0.1),
        grad_clip_norm=None,
    ),
    epochs=7.0,
    batch_size=4096,
    loss="sigmoid",
    evaluations=(
        EvalConfig(
            name="held_out",
            data="tfds:./data/jft:train[:16384]",
            batch_size=1024,
            preprocessing=Preprocessing(
                224, resize_to=256, keep_aspect=True, interpolation="tf_area", exif=False
            ),
        ),
    ),
    log_every=100,
    evaluate_every=10_000,
    checkpoint_every=1_000,
)
