"""Which columns the gates and the experts see."""

from typing import Any

import numpy as np
from jaxtyping import Int
from sklearn.utils._indexing import _get_column_indices


def select_columns(wanted: Any, given: Any, argument: str) -> Int[np.ndarray, "m"]:
    """The indices of the wanted columns.

    Args:
        wanted: None for all; a name or an index, a list of them, a slice, a mask, or a function
            that gets X and returns one of these, as scikit-learn's ColumnTransformer takes it.
        given: X as the user gave it.
        argument: the argument's name, for the message.

    Raises:
        ValueError: there is no such column.

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
