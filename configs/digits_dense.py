"""The dense twin of digits.py: the same model with an MLP in every block, the same training."""

from pathlib import Path

from vmoe.config import load, replace

config = replace(load(Path(__file__).with_name("digits.py")), model=dict(sparse_blocks=()))
