"""The dense counterpart of emoji_pretrain.py: an MLP in every block, the same training.

vmoe train --config emoji_pretrain_dense --workdir runs/emoji_pretrain_dense
"""

from pathlib import Path

from vmoe.config import load, replace

config = replace(load(Path(__file__).with_name("emoji_pretrain.py")), model=dict(sparse_blocks=()))
