"""The generated sections of docs/results/mixtures.md: an answer, a table for each experiment.

A table has only what was measured; an experiment without rows is said to be not measured.
"""

from collections.abc import Sequence
from typing import Any

import numpy as np

from scripts.experiments.framework.differences import LEVEL, p_value
from scripts.experiments.framework.pages import (
    NOT_MEASURED,
    Tables,
    figures_of,
    markdown_table,
    sections_of,
)
from scripts.experiments.framework.runs import Rows
from scripts.experiments.mixtures.answer import answer, corrected_tests, passes, runs
from scripts.experiments.mixtures.coverage import CASES as COVERAGE
from scripts.experiments.mixtures.lines import COLUMNS, CRITERIA, EXPERTS, GATES
from scripts.experiments.mixtures.methods import METHODS
from scripts.experiments.mixtures.noise import EXPERTS as EXPERTS_OF_NOISE
from scripts.experiments.mixtures.stored import CASES, STATES
from scripts.experiments.mixtures.trees import LABELS, MODELS
from scripts.experiments.mixtures.vowels import SYSTEMS

PUBLISHED_ACCURACY = {"train": 88, "test": 90}  # of all four systems


# Vowels


def vowels(rows: Rows) -> str:
    """Passes and accuracies beside those of the paper."""
    if not rows.get("vowels"):
        return NOT_MEASURED
    lines = []
    for name, entry in SYSTEMS.items():
        step, own = runs(rows, name)
        reached = passes(rows, name)
        found = (float(np.mean(reached)), float(np.std(reached))) if reached else None
        cells = [mean_and_deviation(each) for each in (entry.published, found)]
        accuracies = [spread([100 * run[part] for run in own]) for part in PUBLISHED_ACCURACY]
        of = f"{len(reached)} of {len(own)}"
        lines.append([entry.label, *cells, of, step, *accuracies])
    columns = ["system", "passes (sd), paper", "passes (sd), here", "runs that end", "step"]
    columns += [f"{part}, paper {value}" for part, value in PUBLISHED_ACCURACY.items()]
    return markdown_table(columns, lines)


def mean_and_deviation(values: tuple[float, float] | None) -> str:
    return "{:,.0f} ({:,.0f})".format(*values) if values else "-"


def spread(values: Sequence[float]) -> str:
    """A mean in percent with its standard deviation over the runs."""
    return f"{np.mean(values):.1f} ± {np.std(values):.1f}"


# The arm


def arm(rows: Rows) -> str:
    """Relative errors and passes beside those of the paper."""
    lines = []
    for name, method in METHODS.items():
        if own := figures_of(rows, f"arm_{name}"):
            errors = [figures["error"] for figures in own]
            error, published = method.published
            every = [figures["passes"] for figures in own if figures["passes"] is not None]
            lines.append(
                [
                    method.label,
                    f"{np.mean(errors):.3f} ({min(errors):.3f} to {max(errors):.3f})",
                    f"{error:.2f}" if error else "-",
                    f"{np.mean(errors) - error:+.2f}" if error else "-",
                    f"{np.mean(every):,.0f}" if every else "-",
                    f"{published:,}" if published else "-",
                    chosen(own),
                ]
            )
    columns = ["method", "relative error, here", "paper", "difference", "passes, here"]
    columns += ["passes, paper", "chosen settings, by draw"]
    return markdown_table(columns, lines)


def chosen(own: list[dict[str, Any]]) -> str:
    """The chosen settings of each draw, once if they are the same."""
    texts = [
        ", ".join(f"{name} {value:g}" for name, value in figures["settings"].items())
        for figures in own
    ]
    return "; ".join(dict.fromkeys(texts)) or "-"


# Lines


def lines(rows: Rows) -> str:
    """The criteria of every number of experts, the least in bold."""
    table = []
    for name in COLUMNS:
        for figures in figures_of(rows, name):
            for gate in GATES:
                for criterion in CRITERIA[1:]:
                    values = [each[criterion] for each in figures[gate]]
                    least = int(np.argmin(values))
                    cells = [f"{value:.1f}" for value in values]
                    cells[least] = f"**{cells[least]}**"
                    table.append([name, gate, criterion.upper(), *cells])
    columns = ["data", "gate", "criterion", *(f"{k} expert{'s' * (k > 1)}" for k in EXPERTS)]
    return markdown_table(columns, table)


# Noise of estimators


def noise(rows: Rows) -> str:
    """How often intervals hold new targets, by the experts."""
    table = []
    for name in EXPERTS_OF_NOISE:
        own = [figures[name] for figures in figures_of(rows, "noise")]
        if own:
            shares = [spread([100 * each[of] for each in own]) for of in ("in_sample", "left_out")]
            table.append([name, *shares])
    columns = ["experts", "noise of the rows of the fit, percent", "of rows left out, percent"]
    return markdown_table(columns, table)


# R's results


def stored(rows: Rows) -> str:
    """The largest differences from the results of R."""
    table = [
        [
            case.label,
            *(f"{figures[name][state][of]:.0e}" for state in STATES for of in OF),
            f"{case.final:.0e}",
        ]
        for figures in figures_of(rows, "stored")
        for name, case in CASES.items()
    ]
    columns = ["case", *(f"{state}: {of}" for state in STATES for of in OF), "allowed at the end"]
    return markdown_table(columns, table)


OF = ("parameters", "likelihood")


# Coverage


def covered(rows: Rows) -> str:
    """How often the intervals hold the truth, and the errors beside the estimates' spread."""
    table = []
    for name, case in COVERAGE.items():
        own = figures_of(rows, f"coverage_{name}")
        sets = sum(figures["sets"] for figures in own)
        for parameter in own[0]["covered"] if own else ():
            share = sum(figures["covered"][parameter] for figures in own) / sets
            error, spread = (
                np.mean([figures[each][parameter] for figures in own])
                for each in ("error", "spread")
            )
            line = [case.label, f"{case.rows:,}", f"{sets:,}", parameter, f"{100 * share:.1f}"]
            table.append(
                [*line, f"{error:.3f}", f"{spread:.3f}" if sets >= 100 * len(own) else "-"]
            )
    columns = [
        "errors by",
        "rows",
        "data sets",
        "parameter",
        "95% intervals with the truth, percent",
    ]
    return markdown_table([*columns, "mean error", "spread of the estimates"], table)


# Trees


def trees(rows: Rows) -> str:
    """Errors of all classifiers, their differences from the soft tree, and both tests."""
    table = []
    corrected = {test: corrected_tests(rows, test) for test in ("p", "mcnemar")}
    for name, label in LABELS.items():
        for figures in figures_of(rows, f"trees_{name}"):
            soft = np.array(figures["errors"]["soft"])
            for model, text in MODELS.items():
                errors = np.array(figures["errors"][model])
                line = [
                    label,
                    text,
                    f"{errors.mean():.2f} ({errors.min():.2f} to {errors.max():.2f})",
                ]
                test = figures["tests"].get(model)
                if test is None:
                    line += ["-"] * 3
                else:
                    f_test, mcnemar = (
                        marked(test[each], p[name, model]) for each, p in corrected.items()
                    )
                    line += [f"{soft.mean() - errors.mean():+.2f}", f_test]
                    line += ["{} ({} : {})".format(mcnemar, *test["alone"])]
                table.append(line)
    columns = ["data", "model", "error in percent", "soft tree minus this", "p, 5x2cv F"]
    columns += ["p, McNemar (right alone: soft tree, this)"]
    return markdown_table(columns, table)


def marked(p: float, corrected: float) -> str:
    """A p, in bold if it is below ``LEVEL`` after the correction."""
    return f"**{p_value(p)}**" if corrected < LEVEL else p_value(p)


TABLES: Tables = {
    "vowels": ("Vowels by speaker", vowels),
    "arm": ("An arm with four joints", arm),
    "lines": ("Number of experts", lines),
    "noise": ("Intervals with estimators as experts", noise),
    "stored": ("Largest differences from R", stored),
    "coverage": ("Intervals of parameters", covered),
    "trees": ("The soft tree and other classifiers", trees),
}


def sections(rows: Rows, machine: str) -> dict[str, str]:
    """The generated sections of docs/results/mixtures.md by name.

    Args:
        machine: where and when the rows were made.
    """
    return sections_of("mixtures", TABLES, rows, answer(rows), machine)
