"""The config of most commands in tests: ``configs/tiny.py`` with only its sparse block.

A model of one block takes half the time to trace and compile.
"""

from pathlib import Path

from vmoe.config import load, replace

TINY = Path(__file__).parents[1] / "configs" / "tiny.py"
config = replace(load(TINY), model=dict(depth=1, sparse_blocks=(0,)))
