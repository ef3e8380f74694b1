"""What the rows say by plain rules; the answer of docs/results/mixtures.md and its numbers.

A part of the answer is there if all rows that it compares are.
"""

from collections.abc import Sequence
from typing import Any

import numpy as np
from scipy.stats import mannwhitneyu

from scripts.experiments.framework.differences import LEVEL, corrected_p
from scripts.experiments.framework.pages import Answer, answer_of, figures_of
from scripts.experiments.framework.runs import Rows
from scripts.experiments.mixtures.lines import EXPERTS
from scripts.experiments.mixtures.methods import METHODS
from scripts.experiments.mixtures.stored import CASES, STATES, STEPS
from scripts.experiments.mixtures.trees import LABELS, MODELS
from scripts.experiments.mixtures.vowels import SYSTEMS, Em

LINES = ((2, 0), (0, 1))
"""Intercept and slope of the lines of tone perception, the more common answer first."""


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


def answer(rows: Rows) -> str:
    """The answer, with a part for each experiment that was measured."""
    return answer_of(part(rows) for part in (_vowels, _arm, _lines, _stored, _trees))


def _vowels(rows: Rows) -> Answer | None:
    """Whether 4 experts need fewer passes than the smaller network; no end is the most passes."""
    if not rows.get("vowels"):
        return None
    fewer = less(
        *(
            [run["passes"] or np.inf for run in runs(rows, name)[1]]
            for name in ("gradient_4", "network_6")
        )
    )
    published = [name for name, entry in SYSTEMS.items() if entry.published]
    tests = [100 * np.mean([run["test"] for run in runs(rows, name)[1]]) for name in published]
    numbers = f"""passes of 4 experts {_passes(rows, "gradient_4")}, of a network of 6 units
        {_passes(rows, "network_6")}, of 4 experts by EM {_passes(rows, "em_4")}; test accuracy
        {min(tests):.1f} to {max(tests):.1f} (paper 90)"""
    return f"on the vowels, experts need fewer passes than a network: {fewer}", numbers


def _passes(rows: Rows, name: str) -> str:
    """The mean passes of the runs that end, beside the paper's, and how many end if not all do."""
    own, total = passes(rows, name), len(rows["vowels"])
    text = f"{np.mean(own):,.0f}" if own else "none"
    notes = [f"paper {published[0]:,}"] if (published := SYSTEMS[name].published) else []
    notes += [f"{len(own)} of {total} runs end"] if len(own) < total else []
    return f"{text} ({'; '.join(notes)})" if notes else text


def _arm(rows: Rows) -> Answer | None:
    """Whether the hierarchy errs less than the linear model."""
    errors = {
        name: [figures["error"] for figures in figures_of(rows, f"arm_{name}")]
        for name in ("linear", "network", "hierarchy")
    }
    if not errors["hierarchy"] or not errors["linear"]:
        return None
    better = less(errors["hierarchy"], errors["linear"])
    numbers = ", ".join(
        f"{name} {np.mean(own):.2f} (paper {METHODS[name].published[0]:.2f})"
        for name, own in errors.items()
        if own
    )
    text = f"the hierarchy beats a linear model of the arm: {better}"
    return text, f"relative error of the arm: {numbers}"


def _lines(rows: Rows) -> Answer | None:
    """Whether the two experts are the known lines: tuned to two, and to the overtones."""
    if not rows.get("tone"):
        return None
    (figures,) = figures_of(rows, "tone")
    found = [line[:2] for line in figures["lines"]]
    near = all(np.allclose(own, line, atol=0.1) for own, line in zip(found, LINES, strict=True))
    counts = [number_of_experts(rows, "tone", criterion) for criterion in ("bic", "icl")]
    text = f"two experts find the two lines of tone perception: {_word(near)}"
    return text, (
        f"with constant proportions, BIC and ICL choose {counts[0]} and {counts[1]} experts for "
        "tone perception"
    )


def _stored(rows: Rows) -> Answer | None:
    if not rows.get("stored"):
        return None
    (figures,) = figures_of(rows, "stored")
    largest = max(case["final"]["parameters"] for case in figures.values())
    text = f"equal to R's packages within the tolerances: {_word(agrees(rows))}"
    return text, f"largest final difference from R {largest:.0e}"


def _trees(rows: Rows) -> Answer | None:
    """On how many data sets the soft tree is better and worse than each of the others."""
    others = [model for model in MODELS if model != "soft"]
    found = {model: verdicts(rows, model) for model in others}
    if not (count := sum(map(len, found["cart"].values()))):
        return None
    texts = [
        f"{MODELS[model]} {len(of['better'])} and {len(of['worse'])}" for model, of in found.items()
    ]
    better = len(found["cart"]["better"])
    text = f"the soft tree errs less than CART on **{better} of {count}** data sets"
    return text, f"data sets of {count} with a lower and a higher error: {', '.join(texts)}"


def _word(true: bool) -> str:
    return "**yes**" if true else "**no**"
