"""Fine-tuning of V-MoE S/32 on ImageNet-1k at 384 px, as published.

    vmoe train --config imagenet1k_s32_384 --workdir runs/imagenet1k_s32_384 \
        --init runs/imagenet1k_s32_light

Starts from a run of imagenet1k_s32_light.py, which says how to make the data, or from the published
checkpoint (`--init vmoe_s32_last2_e8`). The head is new, positions are resampled.
scripts/prepare/imagenet.py says how to evaluate on ReaL labels and ImageNet-V2.

Published accuracy, the mean of three seeds: 78.8 on the last 1% of the training split, 75.9 on
validation, 77.1 with ReaL labels, 62.0 on ImageNet-V2; 48 minutes each on a TPUv3-8. The recipe was
made to fit on a TPUv3-32, with at least 32 images per device. It has not been trained here.

All numbers are published, except the batch size of evaluations, the number of workers, and how
often metrics, evaluations and checkpoints are written.
"""

from vmoe.config import (
    DataConfig,
    EvalConfig,
    OptimConfig,
    Preprocessing,
    PreprocessingConfig,
    TrainConfig,
    WeightDecayConfig,
    replace,
)
from vmoe.models import model_config

evaluation = EvalConfig(
    batch_size=512,
    preprocessing=Preprocessing(384, interpolation="tf_bilinear", exif=False),
)
config = TrainConfig(
    model=model_config(
        "vmoe_s32_last2_e8",
        image_size=384,
        pre_logits=None,
        moe=dict(router=dict(capacity_factor=1.5)),
    ),
    data=DataConfig(
        "tfds:imagenet2012:train[:99%]",
        preprocessing=PreprocessingConfig("tf_bilinear", exif=False),
        crop_min_area=0.05,
        flip=True,
    ),
    optim=OptimConfig(
        kind="sgd",
        lr=3e-3,
        end_lr=1e-5,
        warmup_steps=500,
        momentum=0.9,
        weight_decay=WeightDecayConfig(kernels=0.0),
        grad_clip_norm=10.0,
    ),
    steps=10_000,
    batch_size=1024,
    loss="softmax",
    evaluations=(
        replace(evaluation, name="held_out", data="tfds:imagenet2012:train[99%:]"),
        replace(evaluation, name="validation", data="tfds:imagenet2012:validation"),
    ),
    log_every=100,
    evaluate_every=1_000,
    checkpoint_every=1_000,
)
