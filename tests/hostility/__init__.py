"""Attacks on runs, commands and readers of models: ``python -m tests.hostility --help``."""

from tests.command import ROOT

TINY = str(ROOT / "configs" / "tiny.py")  # a dense and a sparse block, more than most tests run
