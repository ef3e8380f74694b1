"""V-MoE S/32 on ImageNet-1k from scratch, with medium RandAugment.

    vmoe train --config configs/imagenet1k_s32_medium.py --workdir runs/imagenet1k_s32_medium

As imagenet1k_s32_light.py, with RandAugment(2, 15), as the authors released it. They report no
accuracies of this model beside those of the light one.
"""

from pathlib import Path

from vmoe.config import load, replace

light = load(Path(__file__).with_name("imagenet1k_s32_light.py"))
config = replace(light, data=dict(rand_augment=dict(magnitude=15.0)))
