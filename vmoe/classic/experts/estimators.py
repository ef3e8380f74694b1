"""Experts that are estimators of scikit-learn, fitted again in every M-step.

A regressor gets Gaussian noise of its own around its predictions. The M-step is not exact, so the
log-likelihood may fall.
"""

from typing import Any

import numpy as np
from jaxtyping import Float
from scipy import stats
from sklearn.base import BaseEstimator, clone

from vmoe.classic.design import Design
from vmoe.classic.experts.interface import Experts, Sizes, alive
from vmoe.classic.experts.linear import squared_noise, std_from
from vmoe.classic.experts.weighting import fit_weighted
from vmoe.classic.rows import Rows

LEAST = np.finfo(float).eps  # the least probability of a class, since trees predict zeros


class Estimators(Experts):
    """Clones of one estimator, one per expert."""

    learned = ("models", "std")

    def __init__(self, estimator: BaseEstimator):
        self.estimator = estimator

    def allocate(self, sizes: Sizes) -> None:
        super().allocate(sizes)
        self.new = [seeded(self.estimator, sizes.random) for _ in range(sizes.n_experts)]
        self.models = list(self.new)
        self.std = np.ones((sizes.n_experts, sizes.n_outputs))

    def update(self, rows: Rows, mass: Float[np.ndarray, "n e"]) -> None:
        y = rows.y if self.sizes.classes is None else self.sizes.classes[rows.y]
        y = y[:, 0] if y.ndim == 2 and y.shape[1] == 1 else y
        for e in np.flatnonzero(alive(mass)):
            model = clone(self.new[e])
            self.models[e] = fit_weighted(
                model, rows.expert_given, y, mass[:, e], self.sizes.random
            )
        if self.sizes.classes is None:
            self._update_std(rows, mass)

    def _update_std(self, rows: Rows, mass: np.ndarray) -> None:
        keep = alive(mass)
        squares = squared_noise(mass, rows.y[:, None] - self.means(rows))
        self.std[keep] = std_from(squares[keep], mass.sum(axis=0)[keep], self.sizes.floor)

    def log_density(self, rows: Rows) -> Float[np.ndarray, "n e"]:
        means = self.means(rows)
        if self.sizes.classes is not None:
            return np.log(np.maximum(means[np.arange(len(rows)), :, rows.y], LEAST))
        return stats.norm.logpdf(rows.y[:, None], means, self.std).sum(axis=-1)

    def means(self, rows: Rows) -> Float[np.ndarray, "n e q"]:
        return np.stack([self._mean(model, rows) for model in self.models], axis=1)

    def _mean(self, model: Any, rows: Rows) -> np.ndarray:
        if self.sizes.classes is None:
            return np.asarray(model.predict(rows.expert_given), float).reshape(len(rows), -1)
        result = np.zeros((len(rows), self.sizes.n_outputs))
        known = np.searchsorted(self.sizes.classes, model.classes_)
        result[:, known] = model.predict_proba(rows.expert_given)
        return result

    def penalty(self) -> float:
        return 0.0

    def n_parameters(self) -> int:
        raise ValueError("aic, bic and icl need experts whose parameters can be counted")

    def distributions(self, rows: Rows) -> list[tuple[np.ndarray, Any]]:
        return [(np.arange(len(self.models)), stats.norm(self.means(rows), self.std))]

    def types(self) -> list[type]:
        return [type(self.estimator)]

    def keep(self, experts: list[int]) -> None:
        super().keep(experts)
        self.new = [self.new[e] for e in experts]
        self.models = [self.models[e] for e in experts]
        self.std = self.std[experts]

    def set_parameters(self, coef: Any, std: Any, design: Design) -> None:
        raise ValueError("a start from parameters needs named experts of one kind")

    def fitted(self, design: Design | None) -> list[Any]:
        return list(self.models)


def seeded(estimator: BaseEstimator, random: np.random.RandomState) -> Any:
    """A clone with a seed for every ``random_state`` that is None, as in ensembles."""
    model = clone(estimator)
    names = [
        name
        for name, value in sorted(model.get_params().items())
        if value is None and name.rpartition("__")[2] == "random_state"
    ]
    return model.set_params(**{name: random.randint(2**31 - 1) for name in names})
