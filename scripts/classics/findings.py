"""What the rows say: the figures, and what follows from them by plain rules."""

from collections.abc import Sequence
from typing import Any

import numpy as np
from differences import LEVEL, corrected_p
from experiments import Rows
from figures import figures_of
from scipy.stats import mannwhitneyu

from classics.lines import EXPERTS
from classics.stored import CASES, STATES, STEPS
from classics.trees import LABELS
from classics.vowels import SYSTEMS, Em


def less(first: Sequence[float], second: Sequence[float]) -> str:
    """Whether the first numbers are smaller by a Mann-Whitney test: yes, no, or cannot tell."""
    if mannwhitneyu(first, second).pvalue >= LEVEL:
        return "cannot tell"
    return "**yes**" if np.median(first) < np.median(second) else "**no**"


def runs(rows: Rows, system: str) -> tuple[str, list[dict[str, Any]]]:
    """The runs of a system with its best step: the fewest passes among the most successful.

    Returns:
        The step ("-" for EM) and the runs.
    """
    every = [figures[system] for figures in figures_of(rows, "vowels")]
    if isinstance(SYSTEMS[system].system, Em):
        return "-", every

    def worth(step: str) -> tuple[int, float]:
        reached = [run[step]["passes"] for run in every if run[step]["passes"] is not None]
        return len(reached), -float(np.mean(reached)) if reached else 0.0

    best = max(every[0], key=worth)
    return f"{float(best):g}", [run[best] for run in every]


def passes(rows: Rows, system: str) -> list[int]:
    """The passes of the runs that reached the criterion."""
    return [run["passes"] for run in runs(rows, system)[1] if run["passes"] is not None]


def number_of_experts(rows: Rows, name: str, criterion: str) -> int:
    """The number of experts that a criterion chooses, with constant proportions."""
    (figures,) = figures_of(rows, name)
    return EXPERTS[int(np.argmin([each[criterion] for each in figures["constant"]]))]


def agrees(rows: Rows) -> bool:
    """Whether every difference is allowed."""
    return all(
        figures[name][state]["likelihood"] <= STEPS
        and figures[name][state]["parameters"] <= (case.final if state == "final" else STEPS)
        for figures in figures_of(rows, "stored")
        for name, case in CASES.items()
        for state in STATES
    )


def corrected_tests(rows: Rows, test: str) -> dict[tuple[str, str], float]:
    """The p of one of the two tests by data set and model, corrected for their number.

    Args:
        test: "p" of the F test, or "mcnemar".
    """
    return corrected_p(
        {
            (name, model): of[test]
            for name in LABELS
            for figures in figures_of(rows, f"trees_{name}")
            for model, of in figures["tests"].items()
        }
    )


def verdicts(rows: Rows, model: str) -> dict[str, list[str]]:
    """The data sets on which the soft tree is better, worse, or neither, by the F test."""
    found: dict[str, list[str]] = {"better": [], "worse": [], "neither": []}
    p = corrected_tests(rows, "p")
    for name in LABELS:
        for figures in figures_of(rows, f"trees_{name}"):
            difference = np.mean(figures["errors"]["soft"]) - np.mean(figures["errors"][model])
            sure = p[name, model] < LEVEL
            found[("better" if difference < 0 else "worse") if sure else "neither"].append(name)
    return found
