"""The generated sections of docs/results/multitask.md: an answer, a table for each experiment."""

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import numpy as np

from scripts.experiments.framework.differences import signed
from scripts.experiments.framework.pages import (
    Tables,
    figures_of,
    markdown_table,
    sections_of,
)
from scripts.experiments.framework.runs import Rows
from scripts.experiments.multitask.answer import (
    LABELS,
    answer,
    aucs,
    census_differences,
    census_runs,
    synthetic_differences,
    synthetic_runs,
)
from scripts.experiments.multitask.census import PAIRS, PAPER
from scripts.experiments.multitask.drawings import TASKS

GATES = {1: "one gate", 2: "a gate for each task"}


def synthetic(rows: Rows) -> str:
    """Test losses by relatedness."""
    lines = []
    behind = synthetic_differences(rows)
    for p, models in synthetic_runs(rows).items():
        for model, figures in models.items():
            losses = figures["test"]
            lines.append(
                [
                    f"{p:g}",
                    f"{np.mean(figures['correlation']):.2f}",
                    LABELS[model],
                    f"{figures['parameters']:,}",
                    f"{figures['rate']:g}; {np.mean(figures['epoch']):.0f}",
                    spread(losses, 3),
                    f"{np.median(losses):.3f}",
                    signed(behind[model, p], 4, mark=True) if (model, p) in behind else "",
                ]
            )
    columns = ["relatedness p", "correlation of the targets", "model", "parameters", "rate; epochs"]
    columns += ["test loss", "median", "minus MMoE"]
    return markdown_table(columns, lines)


def census(pair: str) -> Callable[[Rows], str]:
    """A function that makes the table of a pair of tasks, beside the paper's."""

    def table(rows: Rows) -> str:
        tasks, lines = PAIRS[pair], []
        behind = census_differences(rows, pair)
        for model, runs in census_runs(rows, pair).items():
            published = PAPER[pair].get(model)
            parameters = next(iter(runs.values()))["parameters"]
            line = [LABELS[model], f"{parameters:,}", setting(runs.values())]
            for i, task in enumerate(tasks):
                own = aucs(runs, task)
                line += [spread(own, 5), beside(published[i], own) if published else "-"]
                line.append(
                    signed(behind[model, task], 5, mark=True) if (model, task) in behind else ""
                )
            lines.append([*line, f"{aucs(runs, pair).max():.4f}"])
            lines[-1].append(f"{published[2]:.4f}" if published else "-")
        columns = ["model", "parameters", "rate, decay; epochs"]
        for name in (tasks[0], "never married"):
            columns += [f"AUC, {name}", "paper", "minus MMoE"]
        columns += ["best seed", "paper's best"]
        return markdown_table(columns, lines)

    return table


def beside(published: float, own: np.ndarray) -> str:
    """A published mean, and where it lies in the range of our seeds."""
    place = "below" if published < own.min() else "above" if published > own.max() else "inside"
    return f"{published:.4f}, {place}"


def setting(runs: Iterable[Mapping[str, Any]]) -> str:
    """The settings of runs, and their mean number of epochs."""
    runs = list(runs)
    chosen, epochs = runs[0]["settings"], np.mean([run["epochs"] for run in runs])
    return f"{chosen['learning_rate']:g}, {chosen['weight_decay']:g}; {epochs:.0f}"


def labels(rows: Rows) -> str:
    """How the labels of the census correlate."""
    lines = []
    for (pair, tasks), published in zip(PAIRS.items(), (0.1768, 0.2373), strict=True):
        for found in figures_of(rows, f"search_{pair}_mmoe"):
            own = [f"{found['correlation'][name]:.4f}" for name in ("train", "test")]
            lines.append([" and ".join(tasks), *own, f"{published:.4f}"])
    columns = ["pair", "training file", "test file", "paper"]
    return markdown_table(columns, lines)


def drawings(rows: Rows) -> str:
    """What the gates of category and vendor share."""
    lines = []
    for gates, label in GATES.items():
        if every := figures_of(rows, f"drawings_{gates}"):
            accuracies = [[100 * each["accuracy"][task] for each in every] for task in TASKS]
            shared = [[each[name] for each in every] for name in ("overlap", "by_chance")]
            lines.append(
                [label, *(spread(x, 1) for x in accuracies), *(spread(x, 2) for x in shared)]
            )
    for probe in figures_of(rows, "drawings_probe"):
        accuracies = [f"{100 * probe[task]:.1f}" for task in TASKS]
        lines.append(["logistic regression of the mean token", *accuracies, "-", "-"])
    columns = ["gates", *(f"accuracy, {task}" for task in TASKS)]
    columns += ["overlap", "chance baseline"]
    return markdown_table(columns, lines)


def spread(values: Sequence[float] | np.ndarray, digits: int) -> str:
    """A mean, and its standard deviation if there are several seeds."""
    mean = f"{np.mean(values):.{digits}f}"
    return f"{mean} ± {np.std(values, ddof=1):.{digits}f}" if len(values) > 1 else mean


TABLES: Tables = {
    "synthetic": ("Synthetic tasks", synthetic),
    "labels": ("Correlation of the labels of the census", labels),
    "income": ("Census-Income: income", census("income")),
    "education": ("Census-Income: education", census("education")),
    "drawings": ("Category and vendor of drawings", drawings),
}


def sections(rows: Rows, machine: str) -> dict[str, str]:
    """The generated sections of docs/results/multitask.md by name.

    Args:
        machine: where and when the rows were made.
    """
    return sections_of("multitask", TABLES, rows, answer(rows), machine)
