"""Fine-tuning of V-MoE B/16 on CIFAR-10 at 128 px, as published.

    vmoe train --config cifar10_b16 --workdir runs/cifar10_b16 \
        --init vmoe_b16_every2_e8

Starts from the published ImageNet-21k checkpoint, or from a run of imagenet21k_b16.py. Needs
CIFAR-10 as a TFDS data set in ArrayRecord form.

Published accuracy: 98.7 on the test split, the mean of three seeds; 10 minutes each on a TPUv3-8.
The recipe was made to fit on that or on a TPUv2-8. It has not been trained here.

All numbers are published, except the batch size of evaluations, the number of workers, and how
often metrics, evaluations and checkpoints are written.
"""

import math
from pathlib import Path

from vmoe.config import EvalConfig, Preprocessing, load, replace

imagenet = load(Path(__file__).with_name("imagenet1k_b16_384.py"))
evaluation = EvalConfig(
    batch_size=512,
    preprocessing=Preprocessing(128, interpolation="tf_bilinear", exif=False),
)
config = replace(
    imagenet,
    model=dict(image_size=128, num_classes=10, head_bias=-math.log(10)),
    data=dict(name="tfds:cifar10:train[:98%]"),
    optim=dict(lr=1.5e-3, warmup_steps=100),
    steps=1_000,
    evaluations=(
        replace(evaluation, name="validation", data="tfds:cifar10:train[98%:]"),
        replace(evaluation, name="test", data="tfds:cifar10:test"),
    ),
    log_every=50,
    evaluate_every=100,
    checkpoint_every=100,
)
