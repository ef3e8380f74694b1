"""How often 90% intervals hold new targets if the experts are estimators of scikit-learn.

The noise of an expert is that of rows left out of its fit. Beside it stand the residuals of the
rows that it was fitted to, too small for a model that remembers its rows. The targets follow two
laws, one on each side of a border, with noise of 0.3.
"""

from typing import Any

import numpy as np
from scipy.stats import norm
from sklearn.ensemble import HistGradientBoostingRegressor, RandomForestRegressor
from sklearn.linear_model import Ridge
from sklearn.neighbors import KNeighborsRegressor
from sklearn.tree import DecisionTreeRegressor

from scripts.experiments.mixtures.quiet import fit_quietly
from vmoe.classic import MixtureOfExpertsRegressor

LEVEL = 0.9
TRAINED, TESTED = 400, 2_000  # rows
STEPS = 20
EXPERTS: dict[str, Any] = {
    "ridge regression": Ridge(),
    "tree of depth 3": DecisionTreeRegressor(max_depth=3),
    "tree": DecisionTreeRegressor(),
    "forest of 30 trees": RandomForestRegressor(30),
    "boosting, 50 rounds": HistGradientBoostingRegressor(max_iter=50),
    "3 nearest neighbors": KNeighborsRegressor(3),
}


def measure(seed: int, share: float) -> dict[str, dict[str, float]]:
    """The share of new targets in the intervals, with noise "left_out" and "in_sample".

    Args:
        seed: draws the rows.
        share: fraction of the rows.
    """
    rng = np.random.default_rng(seed)
    x, y = draw(rng, max(50, round(share * TRAINED)))
    new = draw(rng, round(share * TESTED))
    return {name: covered(expert, x, y, *new) for name, expert in EXPERTS.items()}


def draw(rng: np.random.Generator, rows: int) -> tuple[np.ndarray, np.ndarray]:
    x = rng.uniform(-2, 2, (rows, 2))
    truth = np.where(x[:, 0] > 0, np.sin(3 * x[:, 1]), x[:, 1])
    return x, truth + 0.3 * rng.normal(size=rows)


def covered(
    expert: Any, x: np.ndarray, y: np.ndarray, new_x: np.ndarray, new_y: np.ndarray
) -> dict[str, float]:
    model = MixtureOfExpertsRegressor(2, experts=expert, max_iter=STEPS, random_state=0)
    fit_quietly(model, x, y)
    weights = model.responsibilities(x, y)
    residuals = y[:, None] - means(model, x)
    std = np.sqrt(np.maximum((weights * residuals**2).sum(0) / weights.sum(0), 1e-4 * y.var()))
    each = norm.cdf(new_y[:, None], means(model, new_x), std)
    return {
        "in_sample": within((model.gate_proba(new_x) * each).sum(axis=1)),
        "left_out": within(model.predict_dist(new_x).cdf(new_y)),
    }


def means(model: MixtureOfExpertsRegressor, x: np.ndarray) -> np.ndarray:
    return np.stack([expert.predict(x) for expert in model.experts_], axis=1)


def within(probabilities: np.ndarray) -> float:
    """The share of targets between the quantiles of the interval."""
    return float(np.mean(np.abs(probabilities - 0.5) <= LEVEL / 2))
