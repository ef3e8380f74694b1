"""V-MoE S/32 on ImageNet-1k from scratch, as published (light RandAugment).

    vmoe train --config imagenet1k_s32_light --workdir runs/imagenet1k_s32_light
    vmoe train --config imagenet1k_s32_light --dry-run    # on a laptop, without the data

Needs ImageNet-1k: `python -m scripts.prepare.imagenet` makes it from the official archives, and
says how to evaluate on ReaL labels and ImageNet-V2. A batch of 8,192 images needs several devices,
or `--accumulate`; see `vmoe plan`.

Published accuracy, the mean of three seeds: 76.8 on the last 1% of the training split, 73.1 on
validation, 74.4 with ReaL labels, 59.2 on ImageNet-V2; 5 hours 50 minutes on a TPUv3-32. It has not
been trained here.

All numbers are published, except the batch size of evaluations, the number of workers, and how
often metrics, evaluations and checkpoints are written.
"""

from vmoe.config import (
    DataConfig,
    EvalConfig,
    OptimConfig,
    Preprocessing,
    PreprocessingConfig,
    RandAugmentConfig,
    RoutingOverrides,
    TrainConfig,
    WeightDecayConfig,
    replace,
)
from vmoe.models import model_config

evaluation = EvalConfig(
    batch_size=1024,
    preprocessing=Preprocessing(
        224, resize_to=256, keep_aspect=True, interpolation="tf_area", exif=False
    ),
    routing=RoutingOverrides(capacity_factor=4.0),
)
config = TrainConfig(
    model=model_config("vmoe_s32_last2_e8", moe=dict(experts=dict(dropout=0.2))),
    data=DataConfig(
        "tfds:imagenet2012:train[:99%]",
        preprocessing=PreprocessingConfig("tf_bilinear", exif=False),
        crop_min_area=0.05,
        flip=True,
        rand_augment=RandAugmentConfig(num_layers=2, magnitude=10.0),
        mixup=0.2,
    ),
    optim=OptimConfig(
        lr=3e-3,
        schedule="linear",
        end_lr=1e-5,
        warmup_steps=10_000,
        weight_decay=WeightDecayConfig(kernels=0.1),
        grad_clip_norm=1.0,
    ),
    epochs=300.0,
    batch_size=8192,
    loss="sigmoid",
    evaluations=(
        replace(evaluation, name="held_out", data="tfds:imagenet2012:train[99%:]"),
        replace(evaluation, name="validation", data="tfds:imagenet2012:validation"),
    ),
    log_every=100,
    evaluate_every=5_000,
    checkpoint_every=1_000,
)
