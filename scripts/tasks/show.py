"""The generated sections of docs/results/multitask.md: an answer, a table for each experiment."""

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import numpy as np
from experiments import Rows, markdown_table
from figures import NOT_MEASURED, Part, Tables, answer_of, figures_of, sections_of

from tasks.census import PAIRS, PAPER
from tasks.drawings import TASKS
from tasks.findings import (
    Difference,
    aucs,
    census_differences,
    census_runs,
    synthetic_differences,
    synthetic_runs,
    verdicts,
)

LABELS = {
    "single_task": "a model for each task",
    "shared_bottom": "shared bottom",
    "one_gate": "one gate",
    "mmoe": "MMoE",
    "cross_stitch": "cross-stitch",
    "cgc": "CGC",
    "ple": "PLE",
}
NAMES = LABELS | {"shared_bottom": "the shared bottom"}
"""As in a sentence."""
GATES = {1: "one gate", 2: "a gate for each task"}
LIMITS = {
    "synthetic": "whose loss is mostly noise that no model can remove",
    "census": "over the seeds on one set of test rows, with settings chosen by one seed, a shape "
    "that was not searched, and training that ends by jumps of the validation loss",
}
"""What a verdict is subject to; it stands before the verdict. The page says more of each."""


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
                    signed(behind[model, p], 4) if (model, p) in behind else "",
                ]
            )
    columns = ["relatedness p", "correlation of the targets", "model", "parameters", "rate; epochs"]
    columns += ["test loss", "median", "minus MMoE"]
    return markdown_table(columns, lines) if lines else NOT_MEASURED


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
                line.append(signed(behind[model, task], 5) if (model, task) in behind else "")
            lines.append([*line, f"{aucs(runs, pair).max():.4f}"])
            lines[-1].append(f"{published[2]:.4f}" if published else "-")
        columns = ["model", "parameters", "rate, decay; epochs"]
        for name in (tasks[0], "never married"):
            columns += [f"AUC, {name}", "paper", "minus MMoE"]
        columns += ["best seed", "paper's best"]
        return markdown_table(columns, lines) if lines else NOT_MEASURED

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
    return markdown_table(columns, lines) if lines else NOT_MEASURED


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
    if not lines:
        return NOT_MEASURED
    columns = ["gates", *(f"accuracy, {task}" for task in TASKS)]
    columns += ["overlap", "chance baseline"]
    return markdown_table(columns, lines)


def spread(values: Sequence[float] | np.ndarray, digits: int) -> str:
    """A mean, and its standard deviation if there are several seeds."""
    mean = f"{np.mean(values):.{digits}f}"
    return f"{mean} ± {np.std(values, ddof=1):.{digits}f}" if len(values) > 1 else mean


def signed(found: Difference, digits: int) -> str:
    """A difference with its standard error, in bold if it is clear."""
    text = f"{found.mean:+.{digits}f}"
    if np.isfinite(found.error):
        text += f" ± {found.error:.{digits}f}"
    return f"**{text}**" if found.clear else text


# The answer


def _synthetic(rows: Rows) -> Part | None:
    """Where MMoE has a clearly lower or higher loss than the shared bottom, and than one gate."""
    behind = synthetic_differences(rows)
    texts, numbers = [], []
    for model in ("shared_bottom", "one_gate"):
        name = NAMES[model]
        found = {f"{p:g}": each for (of, p), each in behind.items() if of == model}
        if found:
            texts.append(
                f"against {name}: "
                + ", ".join(
                    f"{bold(word)} at relatedness {listed(ps)}"
                    for word, ps in verdicts(found, better=1).items()
                )
            )
            each = ", ".join(f"{signed(x, 4).strip('*')} at {p}" for p, x in found.items())
            numbers.append(f"test loss, {name} minus MMoE: {each}")
    if not texts:
        return None
    answer = f"on synthetic tasks, {LIMITS['synthetic']}, MMoE {'; '.join(texts)}"
    return answer, "; ".join(numbers)


def _census(rows: Rows) -> Part | None:
    """Which models MMoE clearly beats at the main task, and which beat it."""
    texts, numbers = [], []
    for pair in PAIRS:
        found = {
            NAMES[model]: each
            for (model, task), each in census_differences(rows, pair).items()
            if task == pair and np.isfinite(each.error)
        }
        if found:
            words = [
                f"**{word} than** {listed(names)}"
                if word != "cannot tell"
                else f"not clearly different from {listed(names)}"
                for word, names in verdicts(found, better=-1).items()
            ]
            texts.append(f"at {pair}, MMoE is {', '.join(words)}")
            each = ", ".join(f"{name} {signed(x, 5).strip('*')}" for name, x in found.items())
            numbers.append(f"AUC of {pair}, model minus MMoE: {each}")
    if not texts:
        return None
    return f"on the census, {LIMITS['census']}: {'; '.join(texts)}", "; ".join(numbers)


def _drawings(rows: Rows) -> Part | None:
    """How much the gates of category and vendor share."""
    if not (every := figures_of(rows, "drawings_2")):
        return None
    shared, chance = (np.mean([each[name] for each in every]) for name in ("overlap", "by_chance"))
    return (
        f"on drawings, the gates of category and vendor share **{shared:.0%}** of their weights",
        f"overlap of the two gates {shared:.2f}, chance baseline {chance:.2f}",
    )


def bold(word: str) -> str:
    return word if word == "cannot tell" else f"**{word}**"


def listed(names: list[str]) -> str:
    """Names as in a sentence: a, b and c."""
    return " and ".join([", ".join(names[:-1]), names[-1]] if len(names) > 1 else names)


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
    answer = answer_of(part(rows) for part in (_synthetic, _census, _drawings))
    return sections_of(TABLES, rows, answer, "python scripts/multitask.py", machine)
