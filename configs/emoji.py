"""V-MoE on emoji: 3,080 drawings of 64 x 64 pixels by two vendors, nine categories.

    python -m scripts.prepare.emoji data/emoji
    vmoe train --config emoji --workdir runs/emoji
    vmoe evaluate --checkpoint runs/emoji

Test accuracy of seeds 0, 1, 2 (--seed): 66.41, 63.28, 64.58, mean 64.76; validation 65.52, 65.23,
66.38. With 192 and 174 emoji, each drawn by both vendors, a standard error is 3 points. Each run
had one core of an Intel Xeon (2026-11-29, jax 0.10.2). A run takes 16 minutes of CPU time on such a
core, and 13 minutes on 2 cores of an AMD EPYC.

Photos of your own keep their aspect: the shorter side is resized, and the central square cut out.
The drawings are squares, so their pixels are the same either way.

The packaged model is of an earlier run with seed 0: 63.54 on test and 68.97 on validation.
"""

from vmoe.config import (
    DataConfig,
    OptimConfig,
    PreprocessingConfig,
    TrainConfig,
    WeightDecayConfig,
)
from vmoe.models import model_config

config = TrainConfig(
    model=model_config("vmoe_emoji"),
    data=DataConfig(
        "folder:data/emoji",
        preprocessing=PreprocessingConfig(keep_aspect=True),
        flip=True,
        shift=6,
        rotate=15.0,
        mixup=0.2,
    ),
    optim=OptimConfig(
        lr=2e-3, end_lr=2e-5, warmup_steps=200, weight_decay=WeightDecayConfig(kernels=0.1)
    ),
    steps=3_000,
    batch_size=64,
    label_smoothing=0.1,
    log_every=100,
    evaluate_every=500,
    checkpoint_every=500,
)
