"""Which columns the gates and the experts see."""

from typing import Any

import numpy as np
from jaxtyping import Int


def select_columns(
    wanted: Any, given: Any, names: Any, count: int, argument: str
) -> Int[np.ndarray, "m"]:
    """The indices of the wanted columns.

    Args:
        wanted: None for all; a name or an index, a list of them, a slice, a mask, or a function
            that gets X and returns one of these, as scikit-learn's ColumnTransformer takes it.
        given: X as the user gave it, which the function gets.
        names: the names of the columns; None if X has none.
        count: the number of columns.
        argument: the argument's name, for the message.

    Raises:
        ValueError: there is no such column.

    >>> select_columns(["b"], None, ["a", "b"], 2, "gate_features")
    array([1])
    """
    wanted = wanted(given) if callable(wanted) else wanted
    if wanted is None:
        return np.arange(count)
    if isinstance(wanted, slice):
        return np.arange(count)[wanted]
    columns = np.atleast_1d(np.asarray(wanted))
    if columns.dtype.kind in "OUS":
        return np.array([_index(name, names, argument) for name in columns], int)
    if columns.dtype == bool and len(columns) != count:
        raise ValueError(f"{argument} has {len(columns)} entries, expected {count}")
    try:
        return np.arange(count)[columns.astype(int) if columns.size == 0 else columns]
    except IndexError:
        raise ValueError(f"{argument}={wanted!r}: X has {count} columns") from None


def _index(name: Any, names: Any, argument: str) -> int:
    if names is None:
        raise ValueError(f"{argument}={name!r}: columns have names only if X is a DataFrame")
    if name not in list(names):
        raise ValueError(f"{argument}={name!r}: X has no such column, only {list(names)}")
    return list(names).index(name)
