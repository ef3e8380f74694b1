"""The figure of docs/results/multitask.md."""

from collections.abc import Mapping
from typing import Any

import numpy as np
from matplotlib import pyplot

from scripts.experiments.framework.pages import figures_of
from scripts.experiments.framework.plots import COLORS, dots
from scripts.experiments.framework.runs import Rows
from scripts.experiments.multitask.answer import (
    LABELS,
    Synthetic,
    aucs,
    census_runs,
    synthetic_runs,
)
from scripts.experiments.multitask.census import PAIRS, PAPER
from scripts.experiments.multitask.drawings import EXPERTS, TASKS
from scripts.experiments.multitask.synthetic import RELATED, SCALES
from scripts.experiments.multitask.tables import GATES
from vmoe.multitask.expert_use import draw_use


def plot(rows: Rows) -> Any:
    """Losses of the synthetic tasks, AUCs of the main tasks, and who uses which expert."""
    figure, axes = pyplot.subplots(3, 3, figsize=(14, 12.5), layout="constrained")
    runs = synthetic_runs(rows)
    for own, c in zip(axes, SCALES, strict=False):
        for ax, p in zip(own, RELATED, strict=True):
            _synthetic(ax, runs.get((c, p), {}))
            ax.set_title(f"c = {c:g}, p = {p:g}: median, quartiles", fontsize=10)
    for ax, pair in zip(axes[2], PAIRS, strict=False):
        _census(ax, rows, pair)
    _drawings(axes[2, 2], rows)
    return figure


def _synthetic(ax: Any, runs: Mapping[str, Synthetic]) -> None:
    """Curves of the excess over the seeds."""
    for color, (model, run) in zip(COLORS, runs.items(), strict=False):
        low, median, high = np.quantile(run.excess, (0.25, 0.5, 0.75), axis=1)
        ax.plot(run.steps, median, color=color, label=f"{LABELS[model]}, rate {run.rate:g}")
        ax.fill_between(run.steps, low, high, color=color, alpha=0.15)
    ax.set(xlabel="step", ylabel="loss above the noise", yscale="log", ylim=(0.004, 1))
    ax.grid(alpha=0.3, which="both")
    if runs:
        ax.legend(fontsize=8)


def _census(ax: Any, rows: Rows, pair: str) -> None:
    runs = census_runs(rows, pair)
    for y, (model, own) in enumerate(reversed(runs.items())):
        values = aucs(own, pair)
        dots(ax, values, y, COLORS[0], alpha=0.5, markersize=5)
        if published := PAPER[pair].get(model):
            ax.plot(published[0], y, "D", color=COLORS[4], fillstyle="none")
    ax.set_yticks(range(len(runs)), [LABELS[model] for model in reversed(runs)])
    ax.set(xlabel="test AUC")
    ax.set_title(f"census, {pair}; diamonds: paper", fontsize=10)
    ax.locator_params(axis="x", nbins=4)
    ax.grid(axis="x", alpha=0.3)


def _drawings(ax: Any, rows: Rows) -> None:
    """The weights of one seed, as a matrix of tasks and experts."""
    use = {
        f"{task},\n{label}": np.array(figures["use"][task])
        for gates, label in GATES.items()
        for figures in figures_of(rows, f"drawings_{gates}")[:1]
        for task in TASKS
    }
    if use:
        draw_use(use, [str(i) for i in range(EXPERTS)], ax=ax)
    ax.set_title("drawings: mean weights, seed 0", fontsize=10)
