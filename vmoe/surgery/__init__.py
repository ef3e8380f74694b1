"""Surgery: from one model to another. Sees models and parameter trees, reads no files."""

from vmoe.surgery.resize import Changes, fit
from vmoe.surgery.upcycle import upcycle

__all__ = ["Changes", "fit", "upcycle"]
