"""What the rows say: differences of models that saw the same data, seed by seed."""

from collections.abc import Mapping
from typing import Any

import numpy as np
from differences import Difference, corrected, difference
from experiments import Rows
from figures import figures_of

from tasks.census import MODELS, PAIRS
from tasks.synthetic import RELATED, UNITS


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
