"""Analysis of routing: records of a model's sparse blocks, and their statistics."""

from vmoe.analysis.capture import capture

__all__ = ["capture"]
