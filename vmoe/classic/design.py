"""The columns that a gate or an expert sees: standardized, with the intercept's in front.

Standardized columns make Newton's method accurate and a penalty independent of the columns' units.
The public coefficients are for the columns as they were given.
"""

from dataclasses import dataclass

import numpy as np
from jaxtyping import Float


@dataclass(frozen=True)
class Design:
    """The weighted mean and standard deviation of every column; constant columns have scale 1."""

    mean: Float[np.ndarray, "d"]
    scale: Float[np.ndarray, "d"]

    @classmethod
    def of(cls, columns: Float[np.ndarray, "n d"], weight: Float[np.ndarray, "n"]) -> "Design":
        """The design for these rows; integer weights are the same as repeated rows."""
        share = weight / weight.sum()
        mean = share @ columns
        scale = np.sqrt(share @ (columns - mean) ** 2)
        return cls(mean, np.where(scale > 1e-12 * np.abs(mean), scale, 1.0))

    def matrix(self, columns: Float[np.ndarray, "n d"]) -> Float[np.ndarray, "n p"]:
        """The standardized columns, after a column of ones."""
        result = np.ones((columns.shape[0], columns.shape[1] + 1))
        result[:, 1:] = (columns - self.mean) / self.scale
        return result

    def to_given(self, coef: Float[np.ndarray, "*e p"]) -> Float[np.ndarray, "*e p"]:
        """Coefficients for the columns as they were given."""
        slopes = coef[..., 1:] / self.scale
        return np.concatenate([coef[..., :1] - (slopes @ self.mean)[..., None], slopes], axis=-1)

    def from_given(self, coef: Float[np.ndarray, "*e p"]) -> Float[np.ndarray, "*e p"]:
        """The reverse of ``to_given``."""
        intercept = coef[..., :1] + (coef[..., 1:] @ self.mean)[..., None]
        return np.concatenate([intercept, coef[..., 1:] * self.scale], axis=-1)
