"""Multinomial regression on soft targets, by Newton's method: the gate, and logistic experts.

Targets are masses: row t has the mass m_tk for outcome k, and the regression maximizes
sum_tk m_tk log softmax(V x_t)_k minus the penalty. The first row of V is zero, without loss of
generality. The penalty is half of ``penalty`` times the squared distance of each row of V from the
mean of its rows, without the intercepts, so that it treats all outcomes alike.
"""

from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Float

from vmoe.classic.grams import slopes_only, weighted_grams
from vmoe.classic.newton import Newton

SLAB = 2048  # rows whose curvature is computed at once, which bounds the memory


def fit_multinomial(
    x: Float[np.ndarray, "n p"],
    mass: Float[np.ndarray, "n k"],
    penalty: float,
    start: Float[np.ndarray, "k p"],
    newton: Newton,
) -> Float[np.ndarray, "k p"]:
    """The coefficients of every outcome, which are zero for the first one.

    Args:
        x: columns, the first of which is the intercept's.
        mass: the mass of every outcome, without negative numbers.
        penalty: strength of the penalty, not negative.
        start: where Newton's method starts.
        newton: the method, which may have the factor of a regression like this one.
    """
    if len(start) < 2:
        return np.zeros_like(start)
    function = Multinomial(x, np.ascontiguousarray(mass.T), mass.sum(axis=1), penalty)
    return newton.maximize(function, start - start[0])


def penalty_of(coef: Any, penalty: float) -> Any:
    """The penalty of coefficients (*e, k, p), arrays of NumPy or JAX, as a positive number."""
    slopes = coef[..., 1:]
    return 0.5 * penalty * ((slopes - slopes.mean(axis=-2, keepdims=True)) ** 2).sum()


def centered(coef: Float[np.ndarray, "*e k p"]) -> Float[np.ndarray, "*e k p"]:
    """The coefficients minus their mean over the outcomes, with zeros for the intercepts."""
    result = coef - coef.mean(axis=-2, keepdims=True)
    result[..., 0] = 0
    return result


def log_softmax(logits: Float[np.ndarray, "k n"]) -> Float[np.ndarray, "k n"]:
    """The logarithm of the softmax over the first axis, along which numpy adds fast."""
    logits = logits - logits.max(axis=0)
    return logits - np.log(np.exp(logits).sum(axis=0))


class Multinomial(NamedTuple):
    """The penalized log-likelihood, as a function of the coefficients.

    Arrays have rows as their last axis, along which numpy is fast.
    """

    x: np.ndarray
    mass: np.ndarray
    total: np.ndarray
    penalty: float

    @property
    def total_mass(self) -> float:
        return float(self.total.sum())

    def evaluate(self, coef: np.ndarray) -> tuple[float, np.ndarray]:
        logits = coef @ self.x.T
        logits -= logits.max(axis=0)
        p = np.exp(logits)
        sums = p.sum(axis=0)
        value = np.vdot(self.mass, logits) - self.total @ np.log(sums)
        p /= sums
        return float(value) - penalty_of(coef, self.penalty), p

    def gradient(self, coef: np.ndarray, p: np.ndarray) -> np.ndarray:
        gradient = (self.mass - self.total * p) @ self.x
        return (gradient - self.penalty * centered(coef))[1:].ravel()

    def curvature(self, p: np.ndarray) -> Float[np.ndarray, "c c"]:
        """The negative Hessian for all outcomes but the first: c = (k - 1) p."""
        k, width = len(p) - 1, self.x.shape[1]
        a, b = np.triu_indices(k)
        grams = np.zeros((len(a), width, width))
        for i in range(0, len(self.x), SLAB):
            q = p[1:, i : i + SLAB]
            weights = q[a] * ((a == b)[:, None] - q[b]) * self.total[i : i + SLAB]
            grams += weighted_grams(self.x[i : i + SLAB], weights)
        blocks = np.empty((k, k, width, width))
        blocks[a, b] = blocks[b, a] = grams
        blocks += self.penalty * (np.eye(k) - 1 / (k + 1))[:, :, None, None] * slopes_only(width)
        return blocks.transpose(0, 2, 1, 3).reshape(k * width, k * width)

    def moved(self, coef: np.ndarray, step: np.ndarray) -> np.ndarray:
        return coef + np.vstack([np.zeros(coef.shape[1]), step.reshape(-1, coef.shape[1])])
