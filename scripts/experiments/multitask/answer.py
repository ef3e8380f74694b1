"""What the rows say: differences of models that saw the same data, seed by seed; the answer."""

import itertools
from collections.abc import Mapping
from typing import Any, NamedTuple

import numpy as np

from scripts.experiments.framework.differences import (
    Difference,
    corrected,
    crossed,
    difference,
    signed,
)
from scripts.experiments.framework.pages import Answer, answer_of, figures_of
from scripts.experiments.framework.runs import Rows
from scripts.experiments.multitask.census import MODELS, PAIRS
from scripts.experiments.multitask.synthetic import SCALES, SETTINGS, UNITS, setting

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
LIMITS = {
    "synthetic": "of which every step draws new rows, after {steps:,} steps at one rate",
    "census": "over seeds and test rows, each model at the best of 12 settings of shape, size and "
    "rate",
}
"""What a verdict is subject to; it stands before the verdict. The page says more of each."""


def verdicts(found: Mapping[str, Difference], better: int) -> dict[str, list[str]]:
    """Where MMoE is clearly "better" or "worse" than a model, and where the tests "cannot tell".

    Args:
        found: a model minus MMoE.
        better: the sign of differences where MMoE is better.
    """
    words: dict[str, list[str]] = {"better": [], "worse": [], "cannot tell": []}
    for name, each in found.items():
        word = "better" if each.mean * better > 0 else "worse"
        words[word if each.clear else "cannot tell"].append(name)
    return {word: names for word, names in words.items() if names}


class Synthetic(NamedTuple):
    """The figures of a model over the seeds that all models have; see ``synthetic.measure``.

    Attributes:
        excess: (points of the curve, seeds).
    """

    excess: np.ndarray
    floor: np.ndarray
    correlation: np.ndarray
    steps: list[int]
    rate: float


def synthetic_runs(rows: Rows) -> dict[tuple[float, float], dict[str, Synthetic]]:
    """The figures by scale and relatedness, and model, of what was measured."""
    found = {model: rows[f"synthetic_{model}"] for model in UNITS if f"synthetic_{model}" in rows}
    if "mmoe" not in found:
        return {}
    parts = sorted(set.intersection(*(set(each) for each in found.values())))
    return {
        (c, p): {
            model: _joined([each[part]["figures"][setting(c, p)] for part in parts])
            for model, each in found.items()
        }
        for c, p in SETTINGS
    }


def _joined(parts: list[dict[str, Any]]) -> Synthetic:
    """The figures of several parts of the seeds."""

    def over_seeds(name: str) -> np.ndarray:
        return np.concatenate([np.array(part[name]) for part in parts], axis=-1)

    return Synthetic(
        excess=over_seeds("excess"),
        floor=over_seeds("floor"),
        correlation=over_seeds("correlation"),
        steps=parts[0]["steps"],
        rate=parts[0]["rate"],
    )


def synthetic_differences(rows: Rows) -> dict[tuple[str, float, float], Difference]:
    """By model, scale and relatedness: the last excess of the model minus that of MMoE."""
    return corrected(
        {
            (model, c, p): difference(own.excess[-1], models["mmoe"].excess[-1])
            for (c, p), models in synthetic_runs(rows).items()
            for model, own in models.items()
            if model != "mmoe"
        }
    )


def census_runs(rows: Rows, pair: str) -> dict[str, dict[int, dict[str, Any]]]:
    """The figures by model and seed, of what was measured."""
    found = {model: rows.get(f"census_{pair}_{model}", {}) for model in MODELS}
    return {
        model: {seed: row["figures"] for seed, row in sorted(runs.items())}
        for model, runs in found.items()
        if runs
    }


def aucs(runs: Mapping[int, dict[str, Any]], task: str) -> np.ndarray:
    """The AUC of a task by seed."""
    return np.array([run["auc"][task] for run in runs.values()])


def pseudo_values(run: Mapping[str, Any], task: str) -> np.ndarray:
    """What each block of test rows adds to an AUC, whose mean over the blocks it nearly is.

    By the jackknife, so that the AUCs of several models can be compared over seeds and rows as
    means are (Dorfman, Berbaum & Metz 1992).
    """
    left = np.array(run["without"][task])
    return len(left) * run["auc"][task] - (len(left) - 1) * left


def census_differences(rows: Rows, pair: str) -> dict[tuple[str, str], Difference]:
    """By model and task: the AUC of the model minus that of MMoE, over the seeds that both have.

    The error is over the seeds and the test rows.
    """
    runs = census_runs(rows, pair)
    mmoe, found = runs.pop("mmoe", {}), {}
    for model, own in runs.items():
        if both := [seed for seed in own if seed in mmoe]:
            for task in PAIRS[pair]:
                values = [
                    np.array([pseudo_values(each[seed], task) for seed in both])
                    for each in (own, mmoe)
                ]
                found[model, task] = crossed(*values, paired=True)
    return corrected(found)


def answer(rows: Rows) -> str:
    """The answer, with a part for each comparison that was measured."""
    return answer_of(part(rows) for part in (_synthetic, _census, _drawings))


def _synthetic(rows: Rows) -> Answer | None:
    """Where MMoE has a clearly lower or higher excess than the shared bottom, and than one gate."""
    behind = synthetic_differences(rows)
    texts, numbers = [], []
    for model, c in itertools.product(("shared_bottom", "one_gate"), SCALES):
        name = NAMES[model]
        found = {
            f"{p:g}": each for (of, scale, p), each in behind.items() if (of, scale) == (model, c)
        }
        if found:
            texts.append(
                f"against {name} at c = {c:g}: "
                + ", ".join(
                    f"{bold(word)} at relatedness {listed(ps)}"
                    for word, ps in verdicts(found, better=1).items()
                )
            )
            each = ", ".join(f"{signed(x, 4)} at {p}" for p, x in found.items())
            numbers.append(f"excess at c = {c:g}, {name} minus MMoE: {each}")
    if not texts:
        return None
    runs = next(iter(synthetic_runs(rows).values()))["mmoe"]
    limits = LIMITS["synthetic"].format(steps=runs.steps[-1])
    return f"on synthetic tasks, {limits}, MMoE {'; '.join(texts)}", "; ".join(numbers)


def _census(rows: Rows) -> Answer | None:
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
            each = ", ".join(f"{name} {signed(x, 5)}" for name, x in found.items())
            numbers.append(f"AUC of {pair}, model minus MMoE: {each}")
    if not texts:
        return None
    return f"on the census, {LIMITS['census']}: {'; '.join(texts)}", "; ".join(numbers)


def _drawings(rows: Rows) -> Answer | None:
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
