"""The colors and marks of the plots, and seeds as dots."""

from typing import Any

import numpy as np

from vmoe.analysis.colors import expert_colors

MARKS = "osD^v"
COLORS = tuple(expert_colors(7)[i] for i in (4, 0, 2, 6, 5))  # without yellow, on white


def dots(ax: Any, values: Any, y: float, color: Any, *, bar: int = 14, **style: Any) -> None:
    """The values of a line as dots, and their mean as a bar."""
    if len(values):
        ax.plot(values, [y] * len(values), "o", color=color, **({"alpha": 0.6} | style))
        ax.plot(np.mean(values), y, "|", color="black", markersize=bar)
