"""One dataclass per kind of rotary positions, with its settings."""

import dataclasses
from typing import Literal

from vmoe.fields import Checked, Count, Positive


@dataclasses.dataclass(frozen=True)
class CenteredRotary(Checked):
    """Rows and columns from -1 to 1, whatever the size of an image (DINOv3, arXiv 2508.10104)."""

    section = "model.rotary"

    kind: Literal["centered"] = "centered"
    """The kind of rotary positions."""
    base: Positive = 100.0
    """Base of the frequencies."""


@dataclasses.dataclass(frozen=True)
class GridRotary(Checked):
    """Rows and columns of a grid, to which the grids of other images are scaled (EVA-02, arXiv
    2303.11331)."""

    section = "model.rotary"

    kind: Literal["grid"] = "grid"
    """The kind of rotary positions."""
    base: Positive = 10_000.0
    """Base of the frequencies."""
    side: Count = 16
    """Side of the grid, in patches."""


@dataclasses.dataclass(frozen=True)
class GoldenRotary(Checked):
    """Rows and columns from -1 to 1 in a square image, along directions of which each pair of
    values of each head has its own; in the first half of a head nothing is rotated (SigLino, arXiv
    2512.20157). The directions are those of "On N-dimensional Rotary Positional Embeddings" (Xiong
    2025)."""

    section = "model.rotary"

    kind: Literal["golden"] = "golden"
    """The kind of rotary positions."""
    lowest: Positive = 1.0
    """The lowest frequency, in radians per unit."""
    highest: Positive = 20.0
    """The highest frequency; those between are geometric."""


Rotary = CenteredRotary | GridRotary | GoldenRotary
