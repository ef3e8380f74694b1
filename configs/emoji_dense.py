"""The dense twin of emoji.py: the same model with an MLP in every block, the same training.

    python scripts/prepare_emoji.py data/emoji
    vmoe train --config configs/emoji_dense.py --workdir runs/emoji_dense
    vmoe evaluate --checkpoint runs/emoji_dense

A run takes about 13 minutes on 2 cores of an AMD EPYC (2026-11-26, jax 0.10.2).
"""

from pathlib import Path

from vmoe.config import load, replace
from vmoe.models import model_config

config = replace(load(Path(__file__).with_name("emoji.py")), model=model_config("vit_emoji"))
