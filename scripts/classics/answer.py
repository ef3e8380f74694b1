"""The answer of docs/results/mixtures.md and its numbers, which the page of answers repeats."""

from collections.abc import Callable

import numpy as np
from experiments import Rows
from figures import Part, answer_of, figures_of

from classics.findings import agrees, number_of_experts, passes, runs, verdicts
from classics.trees import MODELS


def answer(rows: Rows) -> str:
    """The answer, with a part for each experiment that was measured."""
    return answer_of(part(rows) for needed, part in PARTS.items() if rows.get(needed))


def _vowels(rows: Rows) -> Part:
    """Whether every run of 4 experts has fewer passes than every run of the smaller network."""
    experts, network = passes(rows, "gradient_4"), passes(rows, "network_6")
    fewer = bool(experts and network) and max(experts) < min(network)
    tests = [100 * np.mean([run["test"] for run in runs(rows, name)[1]]) for name in SYSTEMS]
    numbers = f"""passes of 4 experts {_mean(experts)}, of a network of 6 units {_mean(network)}
        (paper 1,124 and 2,209), of 4 experts by EM {_mean(passes(rows, "em_4"))}; test accuracy
        {min(tests):.1f} to {max(tests):.1f} (paper 90)"""
    return f"on the vowels, experts need fewer passes than a network: {_word(fewer)}", numbers


def _arm(rows: Rows) -> Part:
    """Whether every draw of the hierarchy errs less than every draw of the linear model."""
    errors = {
        name: [figures["error"] for figures in figures_of(rows, f"arm_{name}")]
        for name in ("linear", "network", "hierarchy")
    }
    better = max(errors["hierarchy"]) < min(errors["linear"] or [0.0])
    numbers = ", ".join(f"{name} {np.mean(own):.2f}" for name, own in errors.items() if own)
    text = f"the hierarchy beats a linear model of the arm: {_word(better)}"
    return text, f"relative error of the arm: {numbers} (paper .31, .09, .10)"


def _lines(rows: Rows) -> Part:
    """Whether the two experts are the known lines: tuned to two, and to the overtones."""
    (figures,) = figures_of(rows, "tone")
    found = [line[:2] for line in figures["lines"]]
    near = all(np.allclose(own, line, atol=0.1) for own, line in zip(found, LINES, strict=True))
    counts = [number_of_experts(rows, "tone", criterion) for criterion in ("bic", "icl")]
    text = f"two experts find the two lines of tone perception: {_word(near)}"
    return text, f"bic and icl choose {counts[0]} and {counts[1]} experts for tone perception"


def _stored(rows: Rows) -> Part:
    (figures,) = figures_of(rows, "stored")
    largest = max(case["final"]["parameters"] for case in figures.values())
    text = f"equal to R's packages within the tolerances: {_word(agrees(rows))}"
    return text, f"largest final difference from R {largest:.0e}"


def _trees(rows: Rows) -> Part:
    """How often the soft tree is better and worse than each of the others."""
    others = [model for model in MODELS if model != "soft"]
    found = {model: verdicts(rows, model) for model in others}
    texts = [
        f"{MODELS[model]} {len(of['better'])} and {len(of['worse'])}" for model, of in found.items()
    ]
    count = sum(map(len, found["cart"].values()))
    better = found["cart"]["better"] and not found["cart"]["worse"]
    numbers = f"data sets of {count} with a lower and a higher error: {', '.join(texts)}"
    return f"the soft tree errs less than CART: {_word(bool(better))}", numbers


LINES = ((2, 0), (0, 1))
"""Intercept and slope of the lines of tone perception, the more common answer first."""
SYSTEMS = ("gradient_4", "gradient_8", "network_6", "network_12")
PARTS: dict[str, Callable[[Rows], Part]] = {
    "vowels": _vowels,
    "arm_hierarchy": _arm,
    "tone": _lines,
    "stored": _stored,
    "trees_breast_cancer": _trees,
}
"""The parts by the experiment that they need."""


def _word(true: bool) -> str:
    return "**yes**" if true else "**no**"


def _mean(values: list[int]) -> str:
    return f"{np.mean(values):,.0f}" if values else "none"
