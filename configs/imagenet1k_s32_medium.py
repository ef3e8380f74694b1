"""V-MoE S/32 on ImageNet-1k from scratch, with medium RandAugment.

    vmoe train --config imagenet1k_s32_medium --workdir runs/imagenet1k_s32_medium

As imagenet1k_s32_light.py, with RandAugment(2, 15) and for 1,000 epochs, as published. No accuracy
is published. The published medium augmentation has mixup of 0.2 or of 0.5, and it is not said which
one trained this model: 0.2 is our choice. Needs the same data and devices, for 3.3 times as many
steps. It has not been trained here.
"""

from pathlib import Path

from vmoe.config import load, replace

light = load(Path(__file__).with_name("imagenet1k_s32_light.py"))
config = replace(light, data=dict(rand_augment=dict(magnitude=15.0)), epochs=1000.0)
