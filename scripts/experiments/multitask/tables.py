"""The generated sections of docs/results/multitask.md: an answer, a table for each experiment."""

from collections.abc import Callable, Mapping, Sequence
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
from scripts.experiments.multitask.census import (
    PAIRS,
    PAPER,
    RATES,
    SEARCHED,
    SHAPES,
    Shape,
    best,
    settings_of,
)
from scripts.experiments.multitask.drawings import TASKS
from scripts.experiments.multitask.synthetic import RELATED, SCALES, linear_excess

GATES = {1: "one gate", 2: "a gate for each task"}


def synthetic(rows: Rows) -> str:
    """Excess losses by scale and relatedness."""
    lines = []
    behind = synthetic_differences(rows)
    for (c, p), models in synthetic_runs(rows).items():
        mmoe = models["mmoe"].excess[-1]
        for model, run in models.items():
            last = run.excess[-1]
            differs = (model, c, p) in behind
            lines.append(
                [
                    f"{c:g}",
                    f"{p:g}",
                    f"{np.mean(run.correlation):.2f}",
                    LABELS[model],
                    f"{run.rate:g}",
                    spread(last, 4),
                    f"{np.median(last):.4f}",
                    signed(behind[model, c, p], 4, mark=True) if differs else "",
                    f"{np.mean(last > mmoe):.0%}" if differs else "",
                ]
            )
    columns = ["c", "relatedness p", "correlation", "model", "rate", "excess", "median"]
    columns += ["minus MMoE", "MMoE is lower"]
    return markdown_table(columns, lines)


def noise(rows: Rows) -> str:
    """What no model can remove, and no linear one."""
    lines = []
    runs = synthetic_runs(rows)
    for c in SCALES:
        if (c, RELATED[0]) in runs:
            floor = runs[c, RELATED[0]]["mmoe"].floor
            linear = [linear_excess(c, seed) for seed in range(len(floor))]
            lines.append([f"{c:g}", f"{len(floor)}"])
            lines[-1] += [f"{np.mean(floor):.3f}"]
            lines[-1] += [f"{each:.3f}" for each in np.quantile(floor, (0.1, 0.5, 0.9))]
            lines[-1] += [f"{np.mean(linear):.2f}", f"{np.median(linear):.2f}"]
    columns = ["c", "seeds", "noise, mean", "first decile", "median", "last decile"]
    columns += ["best linear function, mean excess", "median"]
    return markdown_table(columns, lines)


def census(pair: str) -> Callable[[Rows], str]:
    """A function that makes the table of a pair of tasks, beside the paper's."""

    def table(rows: Rows) -> str:
        tasks, lines = PAIRS[pair], []
        behind = census_differences(rows, pair)
        for model, runs in census_runs(rows, pair).items():
            published = PAPER[pair].get(model)
            line = [LABELS[model], *setting(model, list(runs.values()))]
            for i, task in enumerate(tasks):
                own = aucs(runs, task)
                line += [spread(own, 5), beside(published[i], own) if published else "-"]
                line.append(
                    signed(behind[model, task], 5, mark=True) if (model, task) in behind else ""
                )
            lines.append([*line, f"{aucs(runs, pair).max():.4f}"])
            lines[-1].append(f"{published[2]:.4f}" if published else "-")
        columns = ["model", "layers", "parameters", "rate", "epochs"]
        for name in (tasks[0], "never married"):
            columns += [f"AUC, {name}", "paper", "minus MMoE"]
        columns += ["best seed", "paper's best"]
        return markdown_table(columns, lines)

    return table


def beside(published: float, own: np.ndarray) -> str:
    """A published mean, and where it lies in the range of our seeds."""
    place = "below" if published < own.min() else "above" if published > own.max() else "inside"
    return f"{published:.4f}, {place}"


def setting(model: str, runs: Sequence[Mapping[str, Any]]) -> list[str]:
    """The layers of runs of a model, their parameters, rate, and mean number of epochs."""
    shape, rate = settings_of(model)[runs[0]["setting"]]
    epochs = np.mean([epochs for run in runs for epochs in run["epochs"]])
    return [shaped(model, shape), f"{runs[0]['parameters']:,}", f"{rate:g}", f"{epochs:.0f}"]


def shaped(model: str, shape: Shape) -> str:
    """A shape in words."""
    layers = " and ".join(map(str, shape.units))
    if model in ("cgc", "ple"):
        return f"{shape.experts} shared, {shape.task_experts} own: {layers}"
    return layers if shape.experts == 1 else f"{shape.experts} experts: {layers}"


def search(rows: Rows) -> str:
    """The mean validation AUC of the main task by shape, size and rate, in percent."""
    lines = []
    for model, shapes in SHAPES.items():
        every = {pair: figures_of(rows, f"search_{pair}_{model}") for pair in PAIRS}
        if min(map(len, every.values())) < SEARCHED:
            continue
        own = [[LABELS[model], shaped(model, shape)] for shape in shapes]
        for pair, found in every.items():
            means = np.mean([[each["auc"][pair] for each in one["tried"]] for one in found], axis=0)
            cells = [f"{100 * mean:.2f}" for mean in means]
            cells[best(pair, found)] = f"**{cells[best(pair, found)]}**"
            cells += ["-"] * (len(settings_of(model)) - len(cells))  # of a tiny search
            for line, of_rates in zip(own, np.split(np.array(cells), len(shapes)), strict=True):
                line += of_rates.tolist()
        lines += own
    columns = ["model", "shape"]
    columns += [f"{pair}, {rate:g}" for pair in PAIRS for rate in RATES]
    return markdown_table(columns, lines)


def labels(rows: Rows) -> str:
    """How the labels of the census correlate."""
    lines = []
    for (pair, tasks), published in zip(PAIRS.items(), (0.1768, 0.2373), strict=True):
        for found in figures_of(rows, f"search_{pair}_mmoe")[:1]:
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
    "noise": ("Variance of the noise, in units of that of the function", noise),
    "synthetic": ("Synthetic tasks", synthetic),
    "labels": ("Correlation of the labels of the census", labels),
    "search": ("Census-Income: validation AUC of the settings", search),
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
