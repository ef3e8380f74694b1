"""Shared parts of all figures: panels, legends, labels of experts, the blocks to show."""

from collections.abc import Collection, Sequence

import numpy as np
from matplotlib.axes import Axes
from matplotlib.axis import Axis
from matplotlib.figure import Figure

from vmoe.analysis.colors import expert_colors, text_color
from vmoe.errors import UsageError

SMALL, NORMAL, LARGE = 8, 10, 12
"""Sizes of text in points: ticks and legends, titles of panels, titles of figures."""


def panels(
    rows: int, columns: int, *, size: tuple[float, float], title: str, share_y: bool = False
) -> tuple[Figure, list[list[Axes]]]:
    """A figure with its axes by row and column.

    Args:
        size: width and height of a panel in inches.
    """
    figure = Figure((columns * size[0], rows * size[1] + 0.4), layout="constrained")
    figure.suptitle(title, fontsize=LARGE, wrap=True)
    axes = figure.subplots(rows, columns, squeeze=False, sharey=share_y)
    for ax in axes.flat:
        ax.tick_params(labelsize=SMALL)
    return figure, axes.tolist()


def legend_below(figure: Figure, ax: Axes, *, columns: int = 1) -> None:
    """The legend of a panel below the figure, where it hides nothing."""
    entries = ax.get_legend_handles_labels()
    figure.legend(*entries, loc="outside lower center", fontsize=SMALL, ncols=columns)


def early_to_late(blocks: Collection[int], given: Sequence[int] | None, at_most: int) -> list[int]:
    """The given blocks; if None, some of all blocks, including the first and the last.

    >>> early_to_late(range(1, 24, 2), None, 4)
    [1, 9, 15, 23]
    """
    every = sorted(blocks)
    if unknown := [block for block in given or () if block not in every]:
        raise UsageError(f"use some of {every}", blocks=unknown)
    if given is not None and len(given):
        return list(given)
    which = np.linspace(0, len(every) - 1, min(at_most, len(every)))
    return [every[round(i)] for i in which]


def label_experts(axis: Axis, e: int, *, every: int = 1) -> None:
    """Labels the ticks 0 to e - 1 of an axis with the experts' numbers on their colors.

    Args:
        every: label experts 0, every, 2 * every and so on, if there is no space for all.
    """
    axis.set_ticks(range(0, e, every), [str(i) for i in range(0, e, every)])
    axis.set_tick_params(length=0, pad=4)
    for label, color in zip(axis.get_ticklabels(), expert_colors(e)[::every], strict=True):
        label.set(color=text_color(color), fontweight="bold", fontsize=SMALL)
        label.set_bbox(dict(facecolor=color, edgecolor="none", boxstyle="round,pad=0.2"))
