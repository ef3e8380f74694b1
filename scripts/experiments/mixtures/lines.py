"""How many linear experts two small data sets have, by BIC and ICL.

Tone perception (Cohen 1980): listeners tune a tone, and do so by one of two lines. Nitrogen oxides
(Brinkman 1981): the equivalence ratio of an engine, given its exhaust. Both are examples of the R
package mixtools.
"""

from pathlib import Path
from typing import Any

import numpy as np

from scripts.experiments.mixtures.data import read_pair
from scripts.experiments.mixtures.quiet import fit_quietly
from vmoe.classic import MixtureOfExpertsRegressor

COLUMNS = {"tone": ("stretchratio", "tuned"), "no": ("NO", "Equivalence")}
EXPERTS = tuple(range(1, 9))
GATES: dict[str, list[int] | None] = {"constant": [], "softmax": None}
"""The columns that the gate sees; without any, its proportions are the same for every row."""
CRITERIA = ("aic", "bic", "icl")
FLOOR = 0.01
"""The least variance of an expert, relative to y's; with less, one settles on equal answers."""


def measure(folder: Path, name: str, starts: int, steps: int) -> dict[str, Any]:
    """The criteria for every number of experts and both gates.

    Args:
        name: a key of ``COLUMNS``.
        starts: number of starts of EM; the result with the highest likelihood counts.
        steps: the largest number of EM steps from a start.

    Returns:
        By gate, a list with an entry for each number of experts: the criteria and the
        log-likelihood. "lines" has intercept, slope, standard deviation and proportion of each of
        two experts with a constant gate.
    """
    x, y = read_pair(folder, name, *COLUMNS[name])
    fits = {gate: [fit(x, y, gate, k, starts, steps) for k in EXPERTS] for gate in GATES}
    found: dict[str, Any] = {gate: [figures(m, x, y) for m in own] for gate, own in fits.items()}
    return found | {"lines": lines(fits["constant"][EXPERTS.index(2)], x)}


def fit(
    x: np.ndarray, y: np.ndarray, gate: str, experts: int, starts: int, steps: int
) -> MixtureOfExpertsRegressor:
    """The best of several fits; without penalties, so that the criteria mean what they say."""
    model = MixtureOfExpertsRegressor(
        experts,
        gate_features=GATES[gate],
        gate_penalty=0.0,
        expert_penalty=0.0,
        variance_floor=FLOOR,
        n_init=starts,
        tol=1e-8,
        max_iter=steps,
        random_state=0,
    )
    return fit_quietly(model, x, y)  # "converged" says whether it did


def figures(model: MixtureOfExpertsRegressor, x: np.ndarray, y: np.ndarray) -> dict[str, Any]:
    criteria = {name: float(getattr(model, name)(x, y)) for name in CRITERIA}
    return criteria | {
        "log_likelihood": float(model.lower_bound_),
        "converged": bool(model.converged_),
        "smallest_std": float(min(expert.std_ for expert in model.experts_)),
    }


def lines(model: MixtureOfExpertsRegressor, x: np.ndarray) -> list[list[float]]:
    """The experts as intercept, slope, standard deviation and proportion, the largest first."""
    proportions = model.gate_proba(x[:1])[0]
    every = [
        [*expert.coef_.tolist(), float(expert.std_), float(share)]
        for expert, share in zip(model.experts_, proportions, strict=True)
    ]
    return sorted(every, key=lambda line: -line[-1])
