"""Linear experts with Gaussian noise: each expert and output has a variance of its own.

The M-step is a weighted least squares fit (Jordan & Jacobs 1994, section 4), with a penalty in
units of the noise, as in scikit-learn's Ridge: the objective has minus penalty |slopes|^2 / (2
variance). So the maximum has a closed form, and the fit does not depend on the unit of y.
"""

from typing import Any

import numpy as np
from jaxtyping import Float
from scipy import stats

from vmoe.classic.design import Design
from vmoe.classic.experts.interface import Experts, Sizes, alive, in_shape, one_if_single
from vmoe.classic.grams import slopes_only, solve, weighted_grams
from vmoe.classic.rows import Rows


class Linear(Experts):
    """Linear experts with Gaussian noise of their own; ``experts="linear"``."""

    name = "linear"
    learned = ("coef", "std")
    std: Float[np.ndarray, "e q"]

    def allocate(self, sizes: Sizes) -> None:
        super().allocate(sizes)
        self.std = np.ones(self.coef.shape[:2])

    def update(self, rows: Rows, mass: Float[np.ndarray, "n e"]) -> None:
        keep = alive(mass)
        coef, squares = self.fit(rows, mass[:, keep], keep)
        squares += self.sizes.penalty * np.sum(coef[..., 1:] ** 2, axis=-1)
        self.coef[keep] = coef
        self.std[keep] = std_from(squares, mass[:, keep].sum(axis=0), self.sizes.floor)

    def fit(self, rows: Rows, mass: np.ndarray, keep: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Coefficients and squared noise of the experts ``keep``, whose masses are given."""
        grams = weighted_grams(rows.expert, mass.T)
        moments = [(mass * y[:, None]).T @ rows.expert for y in rows.y.T]
        coef = ridge(grams, np.stack(moments, axis=1), self.sizes.penalty)
        return coef, squared_noise(mass, residuals(rows, coef))

    def log_density(self, rows: Rows) -> Float[np.ndarray, "n e"]:
        scaled = residuals(rows, self.coef) / self.std
        constant = np.log(self.std).sum(axis=1) + 0.5 * np.log(2 * np.pi) * self.std.shape[1]
        return -0.5 * np.einsum("neq,neq->ne", scaled, scaled) - constant

    def means(self, rows: Rows) -> Float[np.ndarray, "n e q"]:
        return linear(rows, self.coef)

    def variances(self) -> Float[np.ndarray, "e q"]:
        return self.std**2

    def penalty(self) -> float:
        slopes = self.coef[..., 1:] / self.std[..., None]
        return 0.5 * self.sizes.penalty * float(np.sum(slopes**2))

    def n_parameters(self) -> int:
        return self.coef.size + self.std.size

    def distributions(self, rows: Rows) -> list[tuple[np.ndarray, Any]]:
        return [(np.arange(len(self.coef)), stats.norm(self.means(rows), self.std))]

    def keep(self, experts: list[int]) -> None:
        super().keep(experts)
        self.std = self.std[experts]

    def set_parameters(self, coef: Any, std: Any, df: Any, design: Design) -> None:
        super().set_parameters(coef, None, df, design)
        if std is None:
            raise ValueError("a start from parameters needs expert_std, one per expert and output")
        self.std = in_shape("expert_std", std, self.std.shape)
        if not np.all(self.std > 0):
            raise ValueError("start: expert_std should be positive")

    def std_of(self, expert: int) -> Any:
        return one_if_single(self.std[expert])


def linear(rows: Rows, coef: Float[np.ndarray, "e q p"]) -> Float[np.ndarray, "n e q"]:
    """The linear predictor of every expert and output."""
    each = coef.reshape(-1, coef.shape[-1]) @ rows.expert.T  # rows last: numpy is fast along them
    return each.T.reshape(len(rows), *coef.shape[:2])


def residuals(rows: Rows, coef: Float[np.ndarray, "e q p"]) -> Float[np.ndarray, "n e q"]:
    """The targets minus the linear predictor of every expert."""
    return rows.y[:, None] - linear(rows, coef)


def squared_noise(
    mass: Float[np.ndarray, "n e"], noise: Float[np.ndarray, "n e q"]
) -> Float[np.ndarray, "e q"]:
    """The sum of each expert's squared noise over rows that count with their mass."""
    return np.einsum("ne,neq->eq", mass, noise**2)


def std_from(
    squares: Float[np.ndarray, "e q"], mass: Float[np.ndarray, "e"], floor: Any
) -> Float[np.ndarray, "e q"]:
    """The standard deviations from the squared noise, not below the root of the floor."""
    return np.sqrt(np.maximum(squares / mass[:, None], floor))


def ridge(
    grams: Float[np.ndarray, "e p p"], moments: Float[np.ndarray, "e q p"], penalty: float
) -> Float[np.ndarray, "e q p"]:
    """The coefficients of ridge regressions whose intercepts are not penalized."""
    penalized = grams + penalty * slopes_only(grams.shape[-1])
    each = [solve(gram, moment.T).T for gram, moment in zip(penalized, moments, strict=True)]
    return np.stack(each)
