"""How often confidence intervals of a mixture's parameters hold the truth.

Two linear experts that overlap: on a row of x ~ N(0, 1), the second one answers with the
probability 1 / (1 + exp(-1.5 x)); the first one says 1 + x, the second -1 - x, both with noise of
standard deviation 1. Data sets are drawn anew, and no penalty biases the fit.
"""

from collections.abc import Callable, Iterable
from typing import Any, NamedTuple

import numpy as np

from scripts.experiments.mixtures.quiet import fit_quietly
from vmoe.classic import MixtureOfExpertsRegressor
from vmoe.classic.summary import Summary

NOMINAL = 0.95
TRUTH = np.array([0.0, 1.5, 1.0, 1.0, 1.0, -1.0, -1.0, 1.0])
"""Gate, first expert and second expert, in the order of ``Summary.estimates``."""
START: dict[str, Any] = {
    "gate_coef": [[0, 0], TRUTH[:2]],
    "expert_coef": [TRUTH[2:4], TRUTH[5:7]],
    "expert_std": [1, 1],
}


class Case(NamedTuple):
    """How the intervals of a data set are found.

    Attributes:
        label: in the table.
        rows: of a data set.
        summary: for a fitted model, x, y, a seed and a number of refits.
    """

    label: str
    rows: int
    summary: Callable[..., Summary]


def information(model: MixtureOfExpertsRegressor, x: np.ndarray, y: np.ndarray, *_: int) -> Summary:
    return model.summary(x, y)


def bootstrap(
    model: MixtureOfExpertsRegressor, x: np.ndarray, _: np.ndarray, seed: int, refits: int
) -> Summary:
    return model.bootstrap(x, refits, random_state=seed)


CASES = {
    "information": Case("observed information", 300, information),
    "information_1000": Case("observed information", 1000, information),
    "bootstrap": Case("parametric bootstrap", 300, bootstrap),
}


def data(seed: int, rows: int) -> tuple[np.ndarray, np.ndarray]:
    """A data set."""
    rng = np.random.default_rng(seed)
    x = rng.normal(size=(rows, 1))
    second = rng.random(rows) < 1 / (1 + np.exp(-1.5 * x[:, 0]))
    return x, np.where(second, -1 - x[:, 0], 1 + x[:, 0]) + rng.normal(size=rows)


def fit(x: np.ndarray, y: np.ndarray) -> MixtureOfExpertsRegressor:
    """A fit to its end from the true parameters, so that no label switches."""
    settings: dict[str, Any] = {"gate_penalty": 0.0, "expert_penalty": 0.0, "start": START}
    settings |= {"tol": 1e-7, "max_iter": 3000}
    return fit_quietly(MixtureOfExpertsRegressor(2, **settings), x, y)


def measure(case: Case, seeds: Iterable[int], refits: int) -> dict[str, Any]:
    """The intervals of some data sets.

    Args:
        case: how they are found.
        seeds: of the data sets.
        refits: of a bootstrap.

    Returns:
        By parameter: in how many data sets the interval holds the truth ("covered"), the robust
        spread of the estimates ("spread"), and the mean of the standard errors ("error"). "sets" is
        the number of data sets, and "without_errors" of those that lack an error, whose parameter
        counts as not covered.
    """
    estimates, errors, covered = [], [], []
    names: list[str] = []
    for seed in seeds:
        x, y = data(seed, case.rows)
        found = case.summary(fit(x, y), x, y, seed, refits)
        low, high = found.interval(NOMINAL).T
        names = [" ".join(name) for name in found.names]
        estimates.append(found.estimates)
        errors.append(found.standard_errors)
        covered.append((low <= TRUTH) & (high >= TRUTH))
    columns = {
        "covered": np.sum(covered, axis=0),
        "spread": np.subtract(*np.quantile(estimates, [0.75, 0.25], axis=0)) / 1.349,
        "error": np.nanmean(errors, axis=0),
    }
    figures = {key: dict(zip(names, map(float, of), strict=True)) for key, of in columns.items()}
    without = int(np.isnan(errors).any(axis=1).sum())
    return figures | {"sets": len(estimates), "without_errors": without}
