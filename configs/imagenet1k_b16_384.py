"""Fine-tuning of V-MoE B/16 on ImageNet-1k at 384 px, as published.

    vmoe train --config imagenet1k_b16_384 --workdir runs/imagenet1k_b16_384 \
        --init runs/imagenet21k_b16

Starts from a run of imagenet21k_b16.py, or from the published checkpoint
(`--init vmoe_b16_every2_e8`). As imagenet1k_s32_384.py with another model; needs the same data and
devices. No training time is published.

Published accuracy, the mean of three seeds: 89.2 on the last 1% of the training split, 85.6 on
validation, 84.1 with ReaL labels, 76.1 on ImageNet-V2. It has not been trained here.
"""

import math
from pathlib import Path

from vmoe.config import load, replace
from vmoe.models import model_config

small = load(Path(__file__).with_name("imagenet1k_s32_384.py"))
config = replace(
    small,
    model=model_config(
        "vmoe_b16_every2_e8",
        image_size=384,
        head_bias=-math.log(1000),
        moe=dict(router=dict(capacity_factor=1.5)),
    ),
)
