"""The recipe of most commands in tests: ``configs/tiny.py`` with its sparse block alone.

A model of one block is traced and compiled in half the time.
"""

from pathlib import Path

from vmoe.config import load, replace

TINY = Path(__file__).parents[1] / "configs" / "tiny.py"
config = replace(load(TINY), model=dict(depth=1, sparse_blocks=(0,)))
