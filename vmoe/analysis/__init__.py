"""Analysis of routing: records of a model's sparse blocks, and numbers from them."""

from vmoe.analysis.capture import capture

__all__ = ["capture"]
