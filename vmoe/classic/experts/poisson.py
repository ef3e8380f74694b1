"""Poisson experts for counts, with the logarithm as their link."""

from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Float
from scipy import stats
from scipy.special import gammaln

from vmoe.classic.experts.interface import Experts, alive
from vmoe.classic.experts.linear import linear
from vmoe.classic.grams import slopes_only, weighted_grams
from vmoe.classic.newton import maximize
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
                function = LogLinear(rows.expert, y, mass[:, e], self.sizes.penalty)
                self.coef[e, j] = maximize(function, self.start(self.coef[e, j], function))

    def start(self, coef: np.ndarray, function: "LogLinear") -> np.ndarray:
        """Where Newton's method starts: at a constant rate before the first fit."""
        if coef.any():
            return coef
        rate = function.mass @ function.y / function.mass.sum()
        return np.r_[np.log(max(rate, 1e-6)), coef[1:]]

    def log_density(self, rows: Rows) -> Float[np.ndarray, "n e"]:
        log_rate = np.minimum(linear(rows, self.coef), LARGEST)
        y = rows.y[:, None]
        return (y * log_rate - np.exp(log_rate) - gammaln(y + 1)).sum(axis=-1)

    def means(self, rows: Rows) -> Float[np.ndarray, "n e q"]:
        return np.exp(np.minimum(linear(rows, self.coef), LARGEST))

    def distributions(self, rows: Rows) -> list[tuple[np.ndarray, Any]]:
        return [(np.arange(len(self.coef)), stats.poisson(self.means(rows)))]


class LogLinear(NamedTuple):
    """The penalized log-likelihood of one expert and output, without the constant."""

    x: np.ndarray
    y: np.ndarray
    mass: np.ndarray
    penalty: float

    @property
    def total_mass(self) -> float:
        return float(self.mass.sum())

    def evaluate(self, coef: np.ndarray) -> tuple[float, np.ndarray]:
        log_rate = np.minimum(self.x @ coef, LARGEST)
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
