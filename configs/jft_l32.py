"""Pre-training of V-MoE L/32 on JFT-style data, as in the paper: jft_s32.py with another model.

    vmoe train --config jft_l32 --workdir runs/jft_l32

Peak learning rate 6e-4, from the paper. The data and the other settings are as in jft_s32.py, whose
header says which are ours. `vmoe plan` says on which devices it fits. It has not been trained here.
"""

from pathlib import Path

from vmoe.config import load, replace
from vmoe.models import model_config

small = load(Path(__file__).with_name("jft_s32.py"))
config = replace(
    small,
    model=model_config(
        "vmoe_l32_every2_e32",
        num_classes=small.model.num_classes,
        head_bias=small.model.head_bias,
        moe=dict(exchange=dict(dtype="bfloat16")),
    ),
    optim=dict(lr=6e-4),
)
