"""The figure of docs/results/real.md."""

from typing import Any

import numpy as np
from matplotlib import pyplot

from scripts.experiments.framework.pages import figures_of
from scripts.experiments.framework.plots import COLORS
from scripts.experiments.framework.runs import Rows
from scripts.experiments.solar.arms import COPIES
from scripts.experiments.solar.data import FOLDS
from scripts.experiments.solar.tables import (
    ARMS,
    BESIDE,
    CELLS,
    SUBSETS,
    TESTED,
    mean_by_fold,
    primary,
)

SPARSE, DENSE, PROBE = COLORS[0], COLORS[4], "0.6"
CURVES = (
    ("MoEs that start as copies", COPIES, SPARSE, "o"),
    (ARMS["dense_active"], ("dense_active",), DENSE, "s"),
    (ARMS["probe"], ("probe",), PROBE, "^"),
)
"""The label, arms, color and mark of each curve."""


def plot(rows: Rows) -> Any:
    """The tested differences, and the accuracies on cells by the number of training images."""
    figure, (left, right) = pyplot.subplots(1, 2, figsize=(11, 4.4), layout="constrained")
    _differences(left, rows)
    _accuracies(right, rows)
    return figure


def _differences(ax: Any, rows: Rows) -> None:
    found = primary(rows)
    for y, (name, each) in enumerate(found.items()):
        fill = "white" if name in BESIDE else SPARSE
        style: dict[str, Any] = dict(fmt="o", color=SPARSE, markerfacecolor=fill, capsize=3)
        ax.errorbar(each.mean, y, xerr=each.margin, **style)
    ax.axvline(0, color="gray", linewidth=1)
    ax.set_yticks(range(len(found)), [SUBSETS[name].title for name in found])
    ax.invert_yaxis()
    ax.grid(axis="x", alpha=0.3)
    ax.set(
        xlabel="dense better  ←  points of accuracy  →  MoEs better",
        ylabel="data set and training images",
    )
    ax.set_title("MoEs minus dense of equal FLOPs, 95% intervals", fontsize=10)


def _accuracies(ax: Any, rows: Rows) -> None:
    """Each arm has two curves: of two classes, and of four levels."""
    subsets, sizes = [name for name in CELLS if name in TESTED], set[int]()
    for figure, line in (("", "-"), ("right", "--")):
        for label, arms, color, mark in CURVES:
            every = {name: mean_by_fold(rows, name, arms, figure) for name in subsets}
            means = {
                _training_images(rows, name, arms[0]): np.mean([*own.values()])
                for name, own in every.items()
                if own
            }
            if means:
                shown = "" if figure else label  # once
                ax.plot(means.keys(), means.values(), line, color=color, marker=mark, label=shown)
                sizes |= means.keys()
    ax.set(xlabel="training images", ylabel="accuracy in percent, mean of the folds", xscale="log")
    ax.set_xticks(sorted(sizes), [f"{size:,}" for size in sorted(sizes)])
    ax.minorticks_off()
    ax.set_title("cells: two classes (solid) and four levels (dashed)", fontsize=10)
    ax.grid(alpha=0.3)
    if sizes:
        ax.legend(fontsize=9)


def _training_images(rows: Rows, subset: str, arm: str) -> int:
    """Their number; all are those of three folds, each of which is tested once."""
    every = figures_of(rows, f"{subset}_{arm}")
    tested = sum(len(figures["draws"][0]["right"]) for figures in every)
    return SUBSETS[subset].size or tested * (FOLDS - 2) // FOLDS
