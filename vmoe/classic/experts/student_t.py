"""Robust linear experts, with Student t noise.

A t distribution is a Gaussian whose variance is random. The M-step is one step of the EM algorithm
for this variance (Lange, Little & Taylor 1989, section 3): a row counts with
(df + 1) / (df + r^2 / scale^2), so outliers hardly count. Then the degrees of freedom maximize the
expert's own likelihood (section 5.3; ECME of Liu & Rubin 1994). The log-likelihood still never
falls.
"""

from numbers import Real
from typing import Any

import numpy as np
from jaxtyping import Float
from scipy import stats
from scipy.optimize import brentq
from scipy.special import digamma, gammaln
from sklearn.base import BaseEstimator

from vmoe.classic.design import Design
from vmoe.classic.experts.interface import Experts, Sizes, alive, in_shape
from vmoe.classic.experts.linear import Linear, linear, residuals, ridge
from vmoe.classic.grams import weighted_grams
from vmoe.classic.rows import Rows

START = 4.0  # degrees of freedom before the first estimate
LEAST, MOST = 2.1, 200.0  # the bounds of an estimate: a variance that is finite; almost a Gaussian


class StudentT(Linear, BaseEstimator):
    """Linear experts with Student t noise, robust to outliers; ``experts="student_t"``."""

    name = "student_t"
    learned = ("coef", "std", "df_", "fitted_once")
    df_: Float[np.ndarray, "e"]

    def __init__(self, df: Any = None):
        """Makes experts that are not fitted.

        Args:
            df: degrees of freedom of the noise, above 2, so that it has a variance; None to
                estimate those of each expert, between 2.1 and 200.
        """
        self.df = df

    def allocate(self, sizes: Sizes) -> None:
        if self.df is not None and not (isinstance(self.df, Real) and float(self.df) > 2):
            raise ValueError(f"df={self.df!r}: should be a number above 2, or None to estimate it")
        super().allocate(sizes)
        self.df_ = np.full(sizes.n_experts, START if self.df is None else float(self.df))
        self.fitted_once = False

    def update(self, rows: Rows, mass: Float[np.ndarray, "n e"]) -> None:
        robust = self.fitted_once
        super().update(rows, mass)
        if self.df is not None or not robust:  # outliers would make the first fit look Gaussian
            return
        keep = np.flatnonzero(alive(mass))
        squares = (residuals(rows, self.coef[keep]) / self.std[keep]) ** 2
        for i, e in enumerate(keep):
            self.df_[e] = best_df(squares[:, i], mass[:, e], self.df_[e])

    def fit(self, rows: Rows, mass: np.ndarray, keep: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        if not self.fitted_once:  # the scales of the first step are unknown: all rows count alike
            self.fitted_once = True
            return super().fit(rows, mass, keep)
        scaled = residuals(rows, self.coef[keep]) / self.std[keep]
        df = self.df_[keep, None]
        weights = mass[:, :, None] * (df + 1) / (df + scaled**2)
        coef = np.empty_like(self.coef[keep])
        for j, y in enumerate(rows.y.T):
            grams = weighted_grams(rows.expert, weights[:, :, j].T)
            moments = (weights[:, :, j] * y[:, None]).T @ rows.expert
            coef[:, [j]] = ridge(grams, moments[:, None], self.sizes.penalty)
        return coef, np.einsum("neq,neq->eq", weights, residuals(rows, coef) ** 2)

    def log_density(self, rows: Rows) -> Float[np.ndarray, "n e"]:
        df = self.df_[:, None]
        tails = np.log1p((residuals(rows, self.coef) / self.std) ** 2 / df)
        return (constant(df) - np.log(self.std) - (df + 1) / 2 * tails).sum(axis=-1)

    def n_parameters(self) -> int:
        return super().n_parameters() + (len(self.df_) if self.df is None else 0)

    def distributions(self, rows: Rows) -> list[tuple[np.ndarray, Any]]:
        noise = stats.t(self.df_[:, None], linear(rows, self.coef), self.std)
        return [(np.arange(len(self.coef)), noise)]

    def resume(self, other: Experts) -> None:
        super().resume(other)
        if self.df is not None:
            self.df_[:] = self.df

    def keep(self, experts: list[int]) -> None:
        super().keep(experts)
        self.df_ = self.df_[experts]

    def set_parameters(self, coef: Any, std: Any, df: Any, design: Design) -> None:
        super().set_parameters(coef, std, None, design)
        self.fitted_once = True
        if df is not None:
            if self.df is not None:
                raise ValueError(f"start: expert_df is not a parameter beside df={self.df}")
            self.df_ = in_shape("expert_df", df, self.df_.shape)
            if np.any((self.df_ < LEAST) | (self.df_ > MOST)):
                raise ValueError(f"start: expert_df should be in [{LEAST:g}, {MOST:g}]")

    def df_of(self, expert: int) -> float:
        return float(self.df_[expert])


def constant(df: Any) -> Any:
    """The logarithm of the t density at 0 with scale 1."""
    return gammaln((df + 1) / 2) - gammaln(df / 2) - 0.5 * np.log(df * np.pi)


def slope_in_df(squares: Float[np.ndarray, "*n q"], df: Any) -> Float[np.ndarray, "*n q"]:
    """The derivative of the log t density in the degrees of freedom.

    Args:
        squares: the squared residuals in units of the scales.
        df: the degrees of freedom.
    """
    rows = (df + 1) / df * squares / (df + squares) - np.log1p(squares / df)
    return (digamma((df + 1) / 2) - digamma(df / 2) - 1 / df + rows) / 2


def best_df(
    squares: Float[np.ndarray, "n q"], mass: Float[np.ndarray, "n"], before: float
) -> float:
    """The degrees of freedom with the largest likelihood, for given coefficients and scales.

    Args:
        squares: the squared residuals in units of the scales.
        mass: how much each row counts.
        before: the value so far, which stays if it is better.
    """
    share = mass / mass.sum()

    def value(df: float) -> float:
        return constant(df) - (df + 1) / 2 * share @ np.log1p(squares / df).mean(axis=1)

    def slope(log_df: float) -> float:
        return float(share @ slope_in_df(squares, np.exp(log_df)).mean(axis=1))

    low, high = np.log([LEAST, MOST])
    if slope(low) <= 0:
        found = LEAST
    elif slope(high) >= 0:
        found = MOST
    else:
        found = float(np.exp(brentq(slope, low, high)))
    return found if value(found) >= value(before) else before
