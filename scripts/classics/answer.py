"""The answer of docs/results/mixtures.md and its numbers, which the page of answers repeats.

A part of the answer is there if all rows that it compares are.
"""

import numpy as np
from experiments import Rows
from figures import Part, answer_of, figures_of

from classics.findings import agrees, less, number_of_experts, passes, runs, verdicts
from classics.methods import METHODS
from classics.trees import MODELS
from classics.vowels import SYSTEMS

LINES = ((2, 0), (0, 1))
"""Intercept and slope of the lines of tone perception, the more common answer first."""


def answer(rows: Rows) -> str:
    """The answer, with a part for each experiment that was measured."""
    return answer_of(part(rows) for part in (_vowels, _arm, _lines, _stored, _trees))


def _vowels(rows: Rows) -> Part | None:
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


def _arm(rows: Rows) -> Part | None:
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


def _lines(rows: Rows) -> Part | None:
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


def _stored(rows: Rows) -> Part | None:
    if not rows.get("stored"):
        return None
    (figures,) = figures_of(rows, "stored")
    largest = max(case["final"]["parameters"] for case in figures.values())
    text = f"equal to R's packages within the tolerances: {_word(agrees(rows))}"
    return text, f"largest final difference from R {largest:.0e}"


def _trees(rows: Rows) -> Part | None:
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
