"""The figure of docs/results/multitask.md."""

from collections.abc import Mapping
from typing import Any

import numpy as np
from matplotlib import pyplot
from scipy import stats

from scripts.experiments.framework.pages import figures_of
from scripts.experiments.framework.plots import COLORS, dots
from scripts.experiments.framework.runs import Rows
from scripts.experiments.multitask.answer import (
    LABELS,
    Synthetic,
    aucs,
    census_differences,
    census_runs,
    synthetic_runs,
)
from scripts.experiments.multitask.census import PAIRS, PAPER
from scripts.experiments.multitask.drawings import EXPERTS, TASKS
from scripts.experiments.multitask.synthetic import RELATED, SCALES
from scripts.experiments.multitask.tables import GATES
from vmoe.analysis.colors import expert_colors
from vmoe.multitask.expert_use import draw_use


def plot(rows: Rows) -> Any:
    """Losses of synthetic tasks, AUCs and curves of the main tasks, and who uses which expert."""
    census = any(census_runs(rows, pair) for pair in PAIRS)
    n = 4 if census else 3
    figure, axes = pyplot.subplots(n, 3, figsize=(14, 4.1 * n), layout="constrained")
    runs = synthetic_runs(rows)
    for own, c in zip(axes, SCALES, strict=False):
        for ax, p in zip(own, RELATED, strict=True):
            _synthetic(ax, runs.get((c, p), {}))
            ax.set_title(f"c = {c:g}, p = {p:g}: median, quartiles", fontsize=10)
    _drawings(axes[2, 0], rows)
    if census:
        for pair, of_seeds, curves in zip(PAIRS, axes[2, 1:], axes[3], strict=False):
            _census(of_seeds, rows, pair)
            _curves(curves, rows, pair)
        _differences(axes[3, 2], rows)
    else:
        axes[2, 1].set_axis_off()
        axes[2, 2].set_axis_off()
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


def _curves(ax: Any, rows: Rows, pair: str) -> None:
    """The mean validation AUC by epoch, while all seeds train; a point where they were best."""
    colors = dict(zip(LABELS, expert_colors(len(LABELS)), strict=True))
    for model, runs in census_runs(rows, pair).items():
        each = [
            next(curves[pair] for curves in run["curves"] if pair in curves)
            for run in runs.values()
        ]
        shortest = min(map(len, each))
        mean = np.mean([curve[:shortest] for curve in each], axis=0)
        ax.plot(range(1, shortest + 1), mean, color=colors[model], label=LABELS[model])
        epochs, best = np.mean([(np.argmax(curve) + 1, max(curve)) for curve in each], axis=0)
        ax.plot(epochs, best, "o", color=colors[model])
    ax.set(xlabel="epoch", ylabel="validation AUC")
    ax.set_title(f"census, {pair}: mean of the seeds; best epoch", fontsize=10)
    ax.grid(alpha=0.3)
    _, top = ax.get_ylim()
    ax.set_ylim(top - 0.01, top)  # without the first epochs
    ax.legend(fontsize=8, loc="lower right")


def _differences(ax: Any, rows: Rows) -> None:
    """The main tasks' AUCs minus MMoE's, with 95% intervals; the legend has a line of its own."""
    models = [model for model in reversed(LABELS) if model != "mmoe"]
    for color, pair, offset in zip(COLORS, PAIRS, (-0.12, 0.12), strict=False):
        found = {of: x for of, x in census_differences(rows, pair).items() if of[1] == pair}
        places = [models.index(model) - offset for model, _ in found]
        ax.errorbar(
            [each.mean for each in found.values()],
            places,
            xerr=[stats.t.ppf(0.975, each.degrees) * each.error for each in found.values()],
            fmt="o",
            color=color,
            label=pair,
        )
    ax.axvline(0, color="gray", linewidth=1)
    ax.set_yticks(range(len(models)), [LABELS[model] for model in models])
    ax.set(xlabel="AUC minus that of MMoE", ylim=(-0.5, len(models) + 0.2))
    ax.set_title("census: differences, 95% intervals", fontsize=10)
    ax.locator_params(axis="x", nbins=4)
    ax.grid(axis="x", alpha=0.3)
    ax.legend(fontsize=8, loc="upper center", ncols=2)


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
