"""What the rows say: differences of models that saw the same data, seed by seed."""

from collections.abc import Mapping
from typing import Any, NamedTuple

import numpy as np
import scipy.stats
from experiments import Rows
from figures import figures_of

from tasks.census import MODELS
from tasks.synthetic import RELATED, UNITS

LEVEL = 0.05


class Difference(NamedTuple):
    """The mean of a difference over the seeds, and its standard error.

    Attributes:
        clear: whether a two-sided t-test of this mean has p < ``LEVEL``.
    """

    mean: float
    error: float
    clear: bool


def difference(first: Any, second: Any) -> Difference:
    """The first minus the second, paired by seed."""
    each = np.asarray(first) - np.asarray(second)
    if len(each) < 2:
        return Difference(float(each.mean()), np.inf, False)
    error = float(each.std(ddof=1) / np.sqrt(len(each)))
    limit = scipy.stats.t.ppf(1 - LEVEL / 2, len(each) - 1)
    return Difference(float(each.mean()), error, bool(abs(each.mean()) > limit * error))


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


def against_mmoe(rows: Rows, pair: str, task: str) -> dict[str, Difference]:
    """By model: the AUC of the model minus that of MMoE, over the seeds that both have."""
    runs = census_runs(rows, pair)
    mmoe, found = runs.pop("mmoe", {}), {}
    for model, own in runs.items():
        if both := [seed for seed in own if seed in mmoe]:
            found[model] = difference(
                *(aucs({seed: each[seed] for seed in both}, task) for each in (own, mmoe))
            )
    return found
