"""Estimators against R's packages on their own data sets, whose numbers are not in the repository.

The results of R are in tests/golden/classic_without_data: from a stored start, the state after one
step of EM, after five, and in the end. flexmix starts with responsibilities, mixtools with
parameters. Tests of the estimators do the same with simulated data, which are stored.
"""

from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from scripts.experiments.framework.runs import ROOT
from scripts.experiments.mixtures.data import read_pair
from scripts.experiments.mixtures.quiet import fit_quietly
from vmoe.classic import MixtureOfExpertsRegressor

FOLDER = ROOT / "tests" / "golden" / "classic_without_data"
STATES = ("step1", "step5", "final")
STILL = 1e-16
"""At this rise per row the likelihood stands still; used where R did not count steps of EM."""


class Case(NamedTuple):
    """A stored result.

    Attributes:
        label: what it is.
        columns: the table, its input and its target.
        settings: parameters of the estimator.
        square: whether the experts also see the square of the input.
        final: how far the final parameters may differ, relative to max(1, size).
    """

    label: str
    columns: tuple[str, str, str]
    settings: dict[str, Any]
    square: bool = False
    final: float = 1e-8


CASES = {
    "flexmix_NPreg_gaussian_k2": Case(
        "flexmix, NPreg, Gaussian on x and x²",
        ("npreg", "x", "yn"),
        {"gate_features": [0]},
        square=True,
    ),
    "flexmix_NPreg_poisson_k2": Case(
        "flexmix, NPreg, Poisson", ("npreg", "x", "yp"), {"experts": "poisson"}
    ),
    "mixtools_hme_NOdata": Case(
        "mixtools hmeEM, NOdata", ("no", "NO", "Equivalence"), {}, final=3e-5
    ),
    "mixtools_regmix_tonedata": Case(
        "mixtools regmixEM, tonedata",
        ("tone", "stretchratio", "tuned"),
        {"gate_features": []},
        final=2e-6,
    ),
}
STEPS = 1e-9
"""How far steps 1 and 5, and the final log-likelihood, may differ."""


def measure(folder: Path, steps: int) -> dict[str, Any]:
    """The largest differences from every stored result.

    Args:
        steps: largest number of EM steps, which are taken where R did not count its own.

    Returns:
        By case and state: "parameters" (of gate, experts and responsibilities) and "likelihood",
        each relative to max(1, the stored size).
    """
    return {name: compare(folder, name, case, steps) for name, case in CASES.items()}


def compare(folder: Path, name: str, case: Case, steps: int) -> dict[str, Any]:
    x, y = read_pair(folder, *case.columns)
    x = np.hstack([x, x**2]) if case.square else x
    with np.load(FOLDER / f"{name}.npz") as stored:
        arrays = dict(stored)
    return {
        state: differences(fit(x, y, case, arrays, state, steps), x, y, arrays, state)
        for state in STATES
    }


def fit(
    x: np.ndarray, y: np.ndarray, case: Case, stored: dict[str, np.ndarray], state: str, steps: int
) -> MixtureOfExpertsRegressor:
    """The estimator after as many steps as the stored state, from the stored start."""
    parameters = "start/expert_coef" in stored
    counts = {"step1": 1, "step5": 5} | ({} if parameters else {"final": stored["final/n_iter"]})
    model = MixtureOfExpertsRegressor(
        2,
        **case.settings,
        gate_penalty=0.0,
        expert_penalty=0.0,
        variance_floor=0.0,
        start=start(stored) if parameters else stored["start/posterior"],
        tol=0.0 if state in counts else STILL,
        max_iter=min(int(counts.get(state, steps)), steps),
    )
    return fit_quietly(model, x, y)


def start(stored: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """A start from parameters."""
    return {
        "gate_coef": gate_of(stored, "start"),
        "expert_coef": stored["start/expert_coef"],
        "expert_std": stored["start/expert_sigma"],
    }


def gate_of(stored: dict[str, np.ndarray], state: str) -> np.ndarray:
    """The coefficients of the gate; constant proportions are a gate that sees no column."""
    if (mixing := stored.get(f"{state}/mixing")) is None:
        return stored[f"{state}/gate_coef"]
    return (np.log(mixing) - np.log(mixing[0]))[:, None]


def differences(
    model: MixtureOfExpertsRegressor,
    x: np.ndarray,
    y: np.ndarray,
    stored: dict[str, np.ndarray],
    state: str,
) -> dict[str, float]:
    pairs = [
        (model.gate_coef_, gate_of(stored, state)),
        ([expert.coef_ for expert in model.experts_], stored[f"{state}/expert_coef"]),
        (model.responsibilities(x, y), stored[f"{state}/posterior"]),
    ]
    if (sigma := stored.get(f"{state}/expert_sigma")) is not None:
        pairs.append(([expert.std_ for expert in model.experts_], sigma))
    return {
        "parameters": max(apart(*pair) for pair in pairs),
        "likelihood": apart(model.lower_bound_, stored[f"{state}/loglik"]),
    }


def apart(own: Any, stored: np.ndarray) -> float:
    """The largest difference relative to max(1, size)."""
    return float(np.max(np.abs(np.asarray(own) - stored) / np.maximum(1, np.abs(stored))))
