"""The figure of docs/results/multitask.md."""

from typing import Any

import numpy as np
from matplotlib import pyplot

from scripts.experiments.framework.pages import figures_of
from scripts.experiments.framework.plots import COLORS, dots
from scripts.experiments.framework.runs import Rows
from scripts.experiments.multitask.answer import LABELS, aucs, census_runs, synthetic_runs
from scripts.experiments.multitask.census import PAIRS, PAPER
from scripts.experiments.multitask.drawings import EXPERTS, TASKS
from scripts.experiments.multitask.synthetic import RELATED
from scripts.experiments.multitask.tables import GATES
from vmoe.multitask.expert_use import draw_use


def plot(rows: Rows) -> Any:
    """Losses of the synthetic tasks, AUCs of the main tasks, and who uses which expert."""
    figure, axes = pyplot.subplots(2, 3, figsize=(14, 8.5), layout="constrained")
    _synthetic(axes[0], rows)
    for ax, pair in zip(axes[1], PAIRS, strict=False):
        _census(ax, rows, pair)
    _drawings(axes[1, 2], rows)
    return figure


def _synthetic(axes: Any, rows: Rows) -> None:
    """Curves of the test loss, one panel for each p."""
    runs = synthetic_runs(rows)
    for ax, p in zip(axes, RELATED, strict=True):
        for color, (model, figures) in zip(COLORS, runs.get(p, {}).items(), strict=False):
            mean, deviation = np.array(figures["curve"])
            epochs = np.arange(1, len(mean) + 1)
            ax.plot(epochs, mean, color=color, label=LABELS[model])
            ax.fill_between(epochs, mean - deviation, mean + deviation, color=color, alpha=0.15)
        ax.set(xlabel="epoch", ylabel="test loss, in units of the variance", ylim=(0, 1))
        ax.set_title(f"synthetic, p = {p:g}: mean ± deviation", fontsize=10)
        ax.grid(alpha=0.3)
        if p in runs:
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
