"""Poisson experts for counts, with the logarithm as their link.

A rate may be per exposure, such as a time, an area or a population: the mean of a count is the
exposure times exp(linear predictor). The logarithm of the exposure is what generalized linear
models call an offset.

Numbers between counts are taken, as ``PoissonRegressor`` does: the likelihood, with the gamma
function in the place of the factorial, is then a quasi-likelihood, which needs a mean alone. Its
criteria do not compare with those of other kinds, and its distribution is one of counts, for which
such a number is impossible.
"""

from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Float
from scipy import stats
from scipy.special import gammaln

from vmoe.classic.experts.interface import Experts, alive
from vmoe.classic.experts.linear import linear
from vmoe.classic.grams import slopes_only, weighted_grams
from vmoe.classic.newton import Newton
from vmoe.classic.rows import Rows

LARGEST = 40.0  # the logarithm of the largest rate; of larger ones no counts can be drawn


class Poisson(Experts):
    """Poisson experts, a log-linear model of counts each; ``experts="poisson"``."""

    name = "poisson"
    counts = True

    def check_targets(self, y: np.ndarray) -> None:
        if np.any(y < 0):
            raise ValueError(
                "Some values of y are negative, which is not allowed for Poisson experts."
            )

    def update(self, rows: Rows, mass: Float[np.ndarray, "n e"]) -> None:
        for e in np.flatnonzero(alive(mass)):
            for j, y in enumerate(rows.y.T):
                data = rows.expert, rows.log_exposure, y, mass[:, e]
                function = LogLinear(*data, self.sizes.penalty)
                start = self.start(self.coef[e, j], function)
                self.coef[e, j] = Newton().maximize(function, start)

    def start(self, coef: np.ndarray, function: "LogLinear") -> np.ndarray:
        """Where Newton's method starts: at a constant rate before the first fit."""
        if coef.any():
            return coef
        rate = function.mass @ function.y / (function.mass @ np.exp(function.offset))
        return np.r_[np.log(max(rate, 1e-6)), coef[1:]]

    def log_density(self, rows: Rows) -> Float[np.ndarray, "n e"]:
        log_rate = self.log_rate(rows)
        y = rows.y[:, None]
        return (y * log_rate - np.exp(log_rate) - gammaln(y + 1)).sum(axis=-1)

    def means(self, rows: Rows) -> Float[np.ndarray, "n e q"]:
        return np.exp(self.log_rate(rows))

    def log_rate(self, rows: Rows) -> Float[np.ndarray, "n e q"]:
        """The logarithm of the mean count."""
        return np.minimum(linear(rows, self.coef) + rows.log_exposure[:, None, None], LARGEST)

    def distributions(self, rows: Rows) -> list[tuple[np.ndarray, Any]]:
        return [(np.arange(len(self.coef)), stats.poisson(self.means(rows)))]


class LogLinear(NamedTuple):
    """The penalized log-likelihood of one expert and output, without the constant."""

    x: np.ndarray
    offset: np.ndarray
    y: np.ndarray
    mass: np.ndarray
    penalty: float

    @property
    def total_mass(self) -> float:
        return float(self.mass.sum())

    def evaluate(self, coef: np.ndarray) -> tuple[float, np.ndarray]:
        log_rate = np.minimum(self.x @ coef + self.offset, LARGEST)
        rate = np.exp(log_rate)
        value = self.mass @ (self.y * log_rate - rate)
        return float(value) - 0.5 * self.penalty * float(coef[1:] @ coef[1:]), rate

    def gradient(self, coef: np.ndarray, rate: np.ndarray) -> np.ndarray:
        slopes = np.r_[0.0, coef[1:]]
        return (self.mass * (self.y - rate)) @ self.x - self.penalty * slopes

    def curvature(self, rate: np.ndarray) -> np.ndarray:
        (gram,) = weighted_grams(self.x, (self.mass * rate)[None])
        return gram + self.penalty * slopes_only(len(gram))

    def moved(self, coef: np.ndarray, step: np.ndarray) -> np.ndarray:
        return coef + step
