"""Draws the accuracy within budgets of compute, searched and spent evenly."""

from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from vmoe.evaluate.plots import write_figure

Points = Sequence[tuple[float, float]]
"""Pairs of cost, as a fraction of that as trained, and accuracy in [0, 1]."""


class TradeOff(NamedTuple):
    """The curves of the plot.

    Attributes:
        searched: settings that differ by block.
        even: settings that are the same in all blocks.
        trained: accuracy of the model as trained.
        chosen: the setting within the budget.
    """

    searched: Points
    even: Points
    trained: float
    chosen: tuple[float, float]


def plot_trade_off(trade_off: TradeOff, path: Path, *, cost: str, data: str) -> None:
    """Writes a PNG.

    Args:
        cost: what the budget counts, with its unit.
        data: the images of the accuracy.

    Raises:
        OSError: it cannot be written.
        ValueError: as for ``write_figure``.
    """
    from matplotlib.figure import Figure

    figure = Figure(figsize=(6.4, 4.2), layout="constrained")
    axes = figure.add_subplot()
    # Two colours of Okabe and Ito's palette, and a shape and a line style for each curve.
    for label, points, colour, style in (
        ("searched, block by block", trade_off.searched, "#0072B2", "o-"),
        ("spent evenly over the blocks", trade_off.even, "#D55E00", "s--"),
    ):
        x, percent = [cost for cost, _ in points], [100 * accuracy for _, accuracy in points]
        axes.plot(x, percent, style, color=colour, label=label, markersize=5)
    axes.plot(1.0, 100 * trade_off.trained, "k*", markersize=12, label="as trained")
    x, y = trade_off.chosen
    ring = dict(markersize=13, markerfacecolor="none", markeredgecolor="black")
    axes.plot(x, 100 * y, "o", **ring, label="chosen")
    axes.set_xlabel(f"{cost} (1 = as trained)")
    axes.set_ylabel("accuracy (%)")
    axes.set_title(data, fontsize=10)
    axes.grid(alpha=0.3)
    axes.legend(fontsize=9, loc="lower right")
    write_figure(figure, path, dpi=150)
