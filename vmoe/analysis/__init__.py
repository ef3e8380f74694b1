"""What a model did: records of its routing, and what its program costs."""

from vmoe.analysis.capture import capture

__all__ = ["capture"]
