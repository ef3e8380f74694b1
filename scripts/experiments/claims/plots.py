"""The plots: lines are means over the seeds, bands are ranges."""

from collections.abc import Sequence
from typing import Any

import numpy as np
from matplotlib import pyplot

from scripts.experiments.claims.measure import PRIORITIES, SLOTS, STRENGTHS
from scripts.experiments.claims.tables import CURVES, FIRST, NUMBERS, measured
from scripts.experiments.claims.variants import VARIANTS
from scripts.experiments.claims.verdicts import Figure, values
from scripts.experiments.framework.plots import COLORS, MARKS, dots
from scripts.experiments.framework.runs import Rows

ATTACKED = ("standard", "dense", "dense_flops", "expert_choice", "soft")
SPECIAL = {"standard": "mean pooling", "class_token": "class token", "all_blocks": "all blocks"}
TITLES = {
    "standard": "mean pooling, trained at capacity factor 1.05",
    "class_token": "class token, trained at capacity factor 1.05",
    "half": "trained at capacity factor 0.5, in order",
    "half_bpr": "trained at capacity factor 0.5, largest gate first",
}


def plots(rows: Rows) -> dict[str, Any]:
    """The figures by name."""
    return {
        "accuracy": _accuracy(rows),
        "capacity": _capacity(rows),
        "attacks": _attacks(rows),
        "specialization": _specialization(rows),
    }


def _accuracy(rows: Rows) -> Any:
    figure, ax = pyplot.subplots(figsize=(8, 4.6), layout="constrained")
    names = measured(rows, VARIANTS)[::-1]
    for y, name in enumerate(names):
        own = [100 * value for value in values(rows, Figure(name, "accuracy"))]
        color = COLORS[0] if not VARIANTS[name].dense else COLORS[4]
        dots(ax, own, y, color)
    ax.set_yticks(range(len(names)), [VARIANTS[name].label for name in names], fontsize=9)
    ax.grid(axis="y", alpha=0.3)
    ax.set(xlabel="test accuracy in percent")
    ax.set_title("dots are seeds, bars are means; orange: dense models", fontsize=10)
    return figure


def _capacity(rows: Rows) -> Any:
    figure, axes = pyplot.subplots(
        2, 2, figsize=(9, 7), layout="constrained", sharex=True, sharey=True
    )
    for ax, name in zip(axes.flat, CURVES, strict=True):
        if rows.get(name):
            for priority, color, mark in zip(PRIORITIES, COLORS, MARKS, strict=False):
                figures = [f"capacity.{number}.{priority}" for number in SLOTS]
                _line(ax, rows, name, SLOTS, figures, FIRST[priority], color, mark)
            nothing = np.mean(values(rows, Figure(name, "capacity.0.order")))
            ax.axhline(100 * nothing, color="gray", linestyle=":", label="everything dropped")
            ax.legend(fontsize=8, loc="lower right")
        ax.set_title(TITLES[name], fontsize=10)
    for ax in axes[1]:
        ax.set(xlabel="slots per expert and group of 8 images")
    for ax in axes[:, 0]:
        ax.set(ylabel="test accuracy in percent")
    return figure


def _attacks(rows: Rows) -> Any:
    figure, ax = pyplot.subplots(figsize=(7, 4.4), layout="constrained")
    for name, color, mark in zip(ATTACKED, COLORS, MARKS, strict=True):
        if rows.get(name):
            figures = [f"attack.{strength}" for strength in (0, *STRENGTHS)]
            label = VARIANTS[name].label.partition(":")[0]
            _line(ax, rows, name, (0, *STRENGTHS), figures, label, color, mark)
    ax.set(xlabel="largest change of a pixel, in 1/255", ylabel="accuracy in percent, 512 images")
    _legend(ax)
    return figure


def _specialization(rows: Rows) -> Any:
    figure, (information, random) = pyplot.subplots(1, 2, figsize=(10, 4), layout="constrained")
    for (name, label), color, mark in zip(SPECIAL.items(), COLORS, MARKS, strict=False):
        for ax, kind, style, scale in (
            (information, "class", "-", 1),
            (information, "position", "--", 1),
            (random, "random", "-", 100),
        ):
            numbers = [i for i in NUMBERS if values(rows, Figure(name, f"{kind}.{i}"))]
            figures = [f"{kind}.{i}" for i in numbers]
            words = label if kind == "random" else f"{label}: {kind}"
            _line(ax, rows, name, numbers, figures, words, color, mark, style, scale)
    information.set(ylabel="normalized mutual information with the expert")
    random.set(ylabel="test accuracy in percent with a random router")
    for ax in (information, random):
        ax.set_xticks(NUMBERS)
        ax.set(xlabel="block")
        _legend(ax)
    return figure


def _legend(ax: Any) -> None:
    if ax.lines:
        ax.legend(fontsize=8)


def _line(
    ax: Any,
    rows: Rows,
    name: str,
    xs: Sequence[int],
    figures: Sequence[str],
    label: str,
    color: str,
    mark: str,
    style: str = "-",
    scale: float = 100,
) -> None:
    own = scale * np.array([values(rows, Figure(name, figure)) for figure in figures])
    if own.size:
        ax.plot(xs, own.mean(1), marker=mark, color=color, linestyle=style, label=label)
        ax.fill_between(xs, own.min(1), own.max(1), color=color, alpha=0.15)
