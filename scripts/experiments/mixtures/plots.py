"""The figures of docs/results/mixtures.md."""

from pathlib import Path
from typing import Any

import numpy as np
from matplotlib import pyplot

from scripts.experiments.framework.pages import figures_of
from scripts.experiments.framework.plots import COLORS, dots
from scripts.experiments.framework.runs import Rows
from scripts.experiments.mixtures.answer import passes
from scripts.experiments.mixtures.data import read_pair
from scripts.experiments.mixtures.lines import COLUMNS
from scripts.experiments.mixtures.methods import METHODS
from scripts.experiments.mixtures.trees import LABELS, MODELS
from scripts.experiments.mixtures.vowels import SYSTEMS

STYLE: dict[str, Any] = {"bar": 12, "alpha": 0.5, "markersize": 5}


def plot(rows: Rows) -> Any:
    """Passes on the vowels, errors of the arm, and errors of the trees."""
    figure, axes = pyplot.subplots(1, 3, figsize=(14, 5), layout="constrained")
    _vowels(axes[0], rows)
    _arm(axes[1], rows)
    _trees(axes[2], rows)
    for ax in axes:
        ax.grid(axis="y", alpha=0.3)
    return figure


def _vowels(ax: Any, rows: Rows) -> None:
    names = list(SYSTEMS)[::-1] if rows.get("vowels") else []
    for y, name in enumerate(names):
        dots(ax, passes(rows, name), y, COLORS[0], **STYLE)
        if published := SYSTEMS[name].published:
            ax.plot(published[0], y, "D", color=COLORS[4], fillstyle="none")
    ax.set_yticks(range(len(names)), [SYSTEMS[name].label for name in names])
    ax.set(xscale="log", xlabel="passes until the squared error is 0.08")
    ax.set_title("vowels: dots are starts, diamonds the paper", fontsize=10)


def _arm(ax: Any, rows: Rows) -> None:
    names = [name for name in METHODS if rows.get(f"arm_{name}")][::-1]
    for y, name in enumerate(names):
        errors = [own["error"] for own in figures_of(rows, f"arm_{name}")]
        dots(ax, errors, y, COLORS[0], **STYLE)
        if published := METHODS[name].published[0]:
            ax.plot(published, y, "D", color=COLORS[4], fillstyle="none")
    ax.set_yticks(range(len(names)), [METHODS[name].label for name in names])
    ax.set(xlabel="relative error on test rows")
    ax.set_xlim(left=0)
    ax.set_title("arm: dots are draws, diamonds the paper's arm", fontsize=10)


def _trees(ax: Any, rows: Rows) -> None:
    names = [name for name in LABELS if rows.get(f"trees_{name}")][::-1]
    offsets = np.linspace(0.3, -0.3, len(MODELS))
    for y, name in enumerate(names):
        (figures,) = figures_of(rows, f"trees_{name}")
        for offset, color, (model, label) in zip(offsets, COLORS, MODELS.items(), strict=True):
            own = np.ravel(figures["errors"][model])
            dots(ax, own, y + offset, color, **STYLE, label=label if not y else None)
    ax.set_yticks(range(len(names)), [LABELS[name].replace(", ", "\n", 1) for name in names])
    ax.set(xlabel="test error in percent")
    ax.set_xlim(left=0)
    if names:
        ax.legend(fontsize=8, loc="upper center", bbox_to_anchor=(0.35, -0.12), ncols=3)
    ax.set_title("trees: dots are ten halves of the data", fontsize=10)


def tone(rows: Rows, folder: Path) -> Any:
    """The answers of tone perception, and the two lines."""
    (figures,) = figures_of(rows, "tone")
    x, y = read_pair(folder, "tone", *COLUMNS["tone"])
    figure, ax = pyplot.subplots(figsize=(6.4, 4.6), layout="constrained")
    ax.plot(x[:, 0], y, "o", color="0.35", alpha=0.45, markersize=5)
    ends = np.array([x.min(), x.max()])
    for (intercept, slope, std, share), color in zip(figures["lines"], COLORS[::2], strict=False):
        line = intercept + slope * ends
        label = f"{intercept:.2f} {slope:+.2f} x, {100 * share:.0f}% of the answers"
        ax.plot(ends, line, color=color, label=label, linewidth=2)
        ax.fill_between(ends, line - 2 * std, line + 2 * std, color=color, alpha=0.15, linewidth=0)
    ax.set(xlabel="stretched overtones: ratio to the fundamental", ylabel="tuned ratio")
    ax.set_title("tone perception: two experts, bands of two standard deviations", fontsize=10)
    ax.legend(loc="upper left", fontsize=9)
    return figure
