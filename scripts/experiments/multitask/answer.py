"""What the rows say: differences of models that saw the same data, seed by seed; the answer."""

from collections.abc import Mapping
from typing import Any

import numpy as np

from scripts.experiments.framework.differences import Difference, corrected, difference, signed
from scripts.experiments.framework.pages import Answer, answer_of, figures_of
from scripts.experiments.framework.runs import Rows
from scripts.experiments.multitask.census import MODELS, PAIRS
from scripts.experiments.multitask.synthetic import RELATED, UNITS

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
    "synthetic": "whose loss is mostly noise that no model can remove",
    "census": "over the seeds on one set of test rows, with settings chosen by one seed, a shape "
    "that was not searched, and training that ends by jumps of the validation loss",
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


def synthetic_runs(rows: Rows) -> dict[float, dict[str, dict[str, Any]]]:
    """The figures by relatedness and model, of what was measured."""
    found = {
        p: {
            model: figures
            for model in UNITS
            for figures in figures_of(rows, f"synthetic_{model}_{p}")
        }
        for p in RELATED
    }
    return {p: models for p, models in found.items() if "mmoe" in models}


def synthetic_differences(rows: Rows) -> dict[tuple[str, float], Difference]:
    """By model and relatedness: the test loss of the model minus that of MMoE."""
    return corrected(
        {
            (model, p): difference(models[model]["test"], models["mmoe"]["test"])
            for p, models in synthetic_runs(rows).items()
            for model in models
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


def census_differences(rows: Rows, pair: str) -> dict[tuple[str, str], Difference]:
    """By model and task: the AUC of the model minus that of MMoE, over the seeds that both have."""
    runs = census_runs(rows, pair)
    mmoe, found = runs.pop("mmoe", {}), {}
    for model, own in runs.items():
        if both := [seed for seed in own if seed in mmoe]:
            for task in PAIRS[pair]:
                found[model, task] = difference(
                    *(aucs({seed: each[seed] for seed in both}, task) for each in (own, mmoe))
                )
    return corrected(found)


def answer(rows: Rows) -> str:
    """The answer, with a part for each comparison that was measured."""
    return answer_of(part(rows) for part in (_synthetic, _census, _drawings))


def _synthetic(rows: Rows) -> Answer | None:
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
            each = ", ".join(f"{signed(x, 4)} at {p}" for p, x in found.items())
            numbers.append(f"test loss, {name} minus MMoE: {each}")
    if not texts:
        return None
    answer = f"on synthetic tasks, {LIMITS['synthetic']}, MMoE {'; '.join(texts)}"
    return answer, "; ".join(numbers)


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
