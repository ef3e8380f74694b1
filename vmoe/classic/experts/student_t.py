"""Robust linear experts, with Student t noise.

A t distribution is a Gaussian whose variance is random. The M-step is one step of the EM algorithm
for this variance (Lange, Little & Taylor 1989, section 3): a row counts with
(df + 1) / (df + r^2 / scale^2), so outliers hardly count. The log-likelihood still never falls.
"""

from numbers import Real
from typing import Any

import numpy as np
from jaxtyping import Float
from scipy import stats
from scipy.special import gammaln

from vmoe.classic.design import Design
from vmoe.classic.experts.interface import Sizes
from vmoe.classic.experts.linear import Linear, linear, residuals, ridge
from vmoe.classic.grams import weighted_grams
from vmoe.classic.rows import Rows


class StudentT(Linear):
    """Linear experts with Student t noise, robust to outliers; ``experts="student_t"``."""

    name = "student_t"
    learned = ("coef", "std", "fitted_once")

    def __init__(self, df: Any = 4.0):
        """Args: df: degrees of freedom of the noise, above 2, so that it has a variance."""
        if not (isinstance(df, Real) and float(df) > 2):
            raise ValueError(f"df={df!r}: should be a number above 2")
        self.df = float(df)

    def __repr__(self) -> str:
        return f"StudentT(df={self.df:g})"

    def allocate(self, sizes: Sizes) -> None:
        super().allocate(sizes)
        self.fitted_once = False

    def fit(self, rows: Rows, mass: np.ndarray, keep: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        if not self.fitted_once:  # the scales of the first step are unknown: all rows count alike
            self.fitted_once = True
            return super().fit(rows, mass, keep)
        scaled = residuals(rows, self.coef[keep]) / self.std[keep]
        weights = mass[:, :, None] * (self.df + 1) / (self.df + scaled**2)
        coef = np.empty_like(self.coef[keep])
        for j, y in enumerate(rows.y.T):
            grams = weighted_grams(rows.expert, weights[:, :, j].T)
            moments = (weights[:, :, j] * y[:, None]).T @ rows.expert
            coef[:, [j]] = ridge(grams, moments[:, None], self.sizes.penalty)
        return coef, np.einsum("neq,neq->eq", weights, residuals(rows, coef) ** 2)

    def log_density(self, rows: Rows) -> Float[np.ndarray, "n e"]:
        half = (self.df + 1) / 2
        tails = np.log1p((residuals(rows, self.coef) / self.std) ** 2 / self.df)
        constant = gammaln(half) - gammaln(self.df / 2) - 0.5 * np.log(self.df * np.pi)
        return (constant - np.log(self.std) - half * tails).sum(axis=-1)

    def distributions(self, rows: Rows) -> list[tuple[np.ndarray, Any]]:
        return [(np.arange(len(self.coef)), stats.t(self.df, linear(rows, self.coef), self.std))]

    def set_parameters(self, coef: Any, std: Any, design: Design) -> None:
        super().set_parameters(coef, std, design)
        self.fitted_once = True
