"""V-MoE-15B, the paper's largest model: 48 blocks, 32 experts in every second one.

    vmoe plan --config vmoe_15b --devices 128
    vmoe train --config vmoe_15b --workdir runs/vmoe_15b --distributed
    vmoe train --config vmoe_15b --dry-run    # on a laptop, without the data

14,705,071,769 parameters, of which 1,723,322,009 are active per token (`vmoe plan`); the paper's
count is 14,705.1 million. Published accuracy: 90.35 on ImageNet, fine-tuned. It has not been
trained here.

From the paper (arXiv 2106.05974): the model's shape, 32 experts with k = 2, 29,593 classes, no
pre-logits layer, Adafactor with a reciprocal square root schedule; from its JFT recipes, as in
jft_s32.py, the batch size, warmup, weight decay and head bias.

Our choice, where we found no source: the number of steps, the learning rate, the timescale and
cooldown of its schedule, gradient clipping to a global norm of 10 (the paper's value for H/14), the
default capacity factor, bfloat16 for the model, remat. The rest is as in jft_s32.py, whose header
says which numbers are ours. Adafactor factors only arrays with two axes of at least 33, one more
than the experts, so that the expert axis is not factored; its authors ask for this. JFT-300M is
private: see jft_s32.py for data of your own.
"""

import math
from pathlib import Path

from vmoe.config import OptimConfig, load, replace
from vmoe.models import model_config

NUM_CLASSES = 29_593

jft = load(Path(__file__).with_name("jft_s32.py"))
config = replace(
    jft,
    model=model_config(
        "vmoe_15b_every2_e32",
        num_classes=NUM_CLASSES,
        head_bias=-math.log(NUM_CLASSES),
        moe=dict(exchange=dict(dtype="bfloat16")),
        dtype="bfloat16",
        remat=True,
    ),
    optim=OptimConfig(
        kind="adafactor",
        min_dim_size_to_factor=33,
        lr=1e-4,
        schedule="rsqrt",
        timescale=10_000,
        cooldown_steps=50_000,
        warmup_steps=10_000,
        weight_decay=jft.optim.weight_decay,
        grad_clip_norm=10.0,
    ),
    steps=500_000,
    epochs=None,
)
