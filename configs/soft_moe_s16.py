"""Pre-training of Soft MoE S/16 on JFT-style data, the long run of its paper.

    vmoe train --config soft_moe_s16 --workdir runs/soft_moe_s16

JFT-4B is private: replace `tfds:./data/jft` by a data set of your own, as in jft_s32.py. A batch of
4,096 images needs several devices; see `vmoe plan`. It has not been trained here.

From the paper (arXiv 2308.00951) and the authors' code: the standard ViT-S/16 with mean pooling and
normalized queries and keys, 128 experts of one slot in its last 6 blocks, 29,593 classes, sigmoid
cross-entropy, 4 million steps of 4,096 images, AdamW with a peak rate of 1e-3 and a reciprocal
square root schedule (10,000 steps of warmup, timescale 10,000, 50,000 steps of cooldown), weight
decay of 3.0 on the head and 0.03 on all other kernels, clipping to a global norm of 1. The authors
also decay the scale of each router by 0.03, which is not done here: it is no kernel. The rest is as
in jft_s32.py, whose header says which numbers are ours.
"""

import math
from pathlib import Path

from vmoe.config import Exchange, MoEConfig, OptimConfig, Soft, WeightDecayConfig, load, replace
from vmoe.models import model_config

NUM_CLASSES = 29_593

jft = load(Path(__file__).with_name("jft_s32.py"))
config = replace(
    jft,
    model=model_config(
        "vit_s16_std",
        pooling="mean",
        qk_norm=True,
        num_classes=NUM_CLASSES,
        head_bias=-math.log(NUM_CLASSES),
        sparse_blocks=tuple(range(6, 12)),
        moe=MoEConfig(
            num_experts=128, router=Soft(capacity=1), exchange=Exchange(dtype="bfloat16")
        ),
    ),
    optim=OptimConfig(
        lr=1e-3,
        schedule="rsqrt",
        timescale=10_000,
        cooldown_steps=50_000,
        warmup_steps=10_000,
        weight_decay=WeightDecayConfig(kernels=0.03, head=3.0),
        grad_clip_norm=1.0,
    ),
    steps=4_000_000,
    epochs=None,
)
