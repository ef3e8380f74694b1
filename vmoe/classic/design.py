"""The columns that a gate or an expert sees: standardized, with the intercept's in front.

Standardized columns make Newton's method accurate and a penalty independent of the columns' units.
The public coefficients are for the columns as they were given.
"""

from dataclasses import dataclass
from typing import Any

import numpy as np
from jaxtyping import Float, Int
from sklearn.utils._indexing import _get_column_indices

ROUNDING = 1e-14  # a column varies only by rounding if its deviation is this part of its mean
LARGE = 1e150  # whose square is finite


@dataclass(frozen=True)
class Design:
    """The weighted mean and standard deviation of every column.

    Constant columns have their magnitude as the scale.
    """

    mean: Float[np.ndarray, "d"]
    scale: Float[np.ndarray, "d"]

    @classmethod
    def of(
        cls, columns: Float[np.ndarray, "n d"], weight: Float[np.ndarray, "n"], name: str
    ) -> "Design":
        """The design for these rows; see ``moments`` for the arguments and errors."""
        mean, variance = moments(columns, weight, name)
        return cls(mean, np.sqrt(variance))

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


def moments(
    columns: Float[np.ndarray, "n d"], weight: Float[np.ndarray, "n"], name: str
) -> tuple[Float[np.ndarray, "d"], Float[np.ndarray, "d"]]:
    """The weighted mean and variance of every column.

    The variance of a constant column is the square of its mean, or 1 for zeros: its own unit
    decides. Integer weights are the same as repeated rows.

    Args:
        name: the name of the columns, for the message.
    """
    share = weight / weight.sum()
    mean = share @ columns
    mean = mean + share @ (columns - mean)  # without most of the rounding of the first mean
    with np.errstate(over="ignore"):
        variance = share @ (columns - mean) ** 2
    if not np.isfinite(variance).all():
        raise ValueError(f"{name} is too large: its variance is not finite; rescale it")
    magnitude = np.abs(mean)
    varies = np.sqrt(variance) > ROUNDING * magnitude
    constant = np.where(magnitude > 0, np.minimum(magnitude, LARGE), 1.0)
    return mean, np.where(varies, variance, constant**2)


def select_columns(wanted: Any, given: Any, argument: str) -> Int[np.ndarray, "m"]:
    """The indices of the wanted columns.

    Args:
        wanted: None for all; a name or an index, a list of them, a slice, a mask, or a function
            that gets X and returns one of these, as scikit-learn's ColumnTransformer takes it.
        given: X as the user gave it.
        argument: the argument's name, for the message.

    >>> select_columns([-1], np.zeros((1, 3)), "gate_features")
    array([2])
    """
    given = given if hasattr(given, "shape") else np.asarray(given)
    wanted = wanted(given) if callable(wanted) else wanted
    if wanted is None:
        return np.arange(given.shape[1])
    try:
        return np.asarray(_get_column_indices(given, wanted), int)
    except (TypeError, ValueError) as error:
        raise ValueError(f"{argument}={wanted!r}: {error}") from None
