"""Values of columns and of targets, as users give them."""

import datetime
from collections.abc import Hashable, Sequence
from decimal import Decimal
from numbers import Real
from typing import Any

import numpy as np
from jaxtyping import Bool, Float


def as_values(place: str, given: Any) -> np.ndarray:
    """An array of the given values. The elements of a list keep their types; decimals are floats.

    Args:
        place: what the values are, for the error.

    Raises:
        ValueError: it is neither an array nor a list, or a value is itself a list or the like.
    """
    if hasattr(given, "__array__"):
        values = as_array(given)
    elif not isinstance(given, Sequence) or isinstance(given, str):
        raise ValueError(f"{place}: {type(given).__name__}: give an array or a list")
    elif not all(isinstance(value, Real) for value in given):
        values = np.fromiter(given, object)
    else:
        values = np.asarray(given)
    if values.dtype.kind == "O":
        single: list[Any] = []
        for value in values.ravel():
            if not isinstance(value, Hashable) or isinstance(value, tuple):
                raise ValueError(
                    f"{place}: a value is a {type(value).__name__}: give single values"
                )
            single.append(float(value) if isinstance(value, Decimal) else value)
        values = np.fromiter(single, object).reshape(values.shape)
    return values


def as_array(given: Any) -> np.ndarray:
    """An array, with None where a masked array is masked."""
    if not isinstance(given, np.ma.MaskedArray):
        return np.asarray(given)
    values = np.fromiter(as_list(given.data), object).reshape(given.shape)
    values[np.ma.getmaskarray(given)] = None
    return values


def as_list(values: np.ndarray) -> list[Any]:
    """The values as Python's own types, dates in microseconds (nanoseconds would be integers)."""
    if values.dtype.kind in "mM":
        values = values.astype(f"{values.dtype.kind}8[us]")
    return values.ravel().tolist()


def is_missing(values: np.ndarray) -> Bool[np.ndarray, "b"]:
    """Where a value is NaN, NaT, None or pandas' NA."""
    if values.dtype.kind == "O":
        return np.array([x is None or type(x).__name__ == "NAType" or x != x for x in values], bool)
    return values != values  # NaN and NaT alone


def is_numeric(values: np.ndarray) -> bool:
    """Whether all values that are not missing are numbers. Booleans are not."""
    if values.dtype.kind != "O":
        return values.dtype.kind in "iuf"
    return all(_is_number(x) for x in values[~is_missing(values)])


def type_of(place: str, values: np.ndarray) -> str | None:
    """The type of all values; "number" for booleans and all numbers, None if all are missing.

    Args:
        place: what the values are, for the error.

    Raises:
        ValueError: they have several types, or one whose values cannot be sorted.
    """
    given = as_list(values[~is_missing(values)])
    if not given or values.dtype.kind in "iufb":
        return "number" if given else None
    found = {_type_name(kind): value for kind, value in {type(x): x for x in given}.items()}
    if len(found) > 1:
        examples = " and ".join(f"{value!r} ({name})" for name, value in sorted(found.items()))
        raise ValueError(f"{place}: values of several types: {examples}: convert them to one")
    ((name, value),) = found.items()
    try:
        sorted(set(given))
    except TypeError:
        raise ValueError(
            f"{place}: values such as {value!r} cannot be sorted: convert them to str"
        ) from None
    return name


def _type_name(kind: type) -> str:
    if issubclass(kind, Real | np.bool_):
        return "number"
    bases = (str, datetime.datetime, datetime.timedelta)  # of types of numpy and pandas
    return next((base for base in bases if issubclass(kind, base)), kind).__name__


def _is_number(value: Any) -> bool:
    return isinstance(value, Real) and not isinstance(value, bool | np.bool_)


def as_numbers(place: str, values: np.ndarray, remedy: str) -> Float[np.ndarray, "b"]:
    """Values as float64; NaN for missing ones.

    Args:
        place: what the values are, for the error.
        remedy: what to do if they are not numbers.

    Raises:
        ValueError: a value is not a finite number.
    """
    given = ~is_missing(values)
    if values.dtype.kind == "O":
        wrong = [x for x in values[given] if not isinstance(x, Real)]
    else:
        wrong = values[given][:1].tolist() if values.dtype.kind not in "iufb" else []
    if wrong:
        raise ValueError(f"{place}: {wrong[0]!r} is not a number: {remedy}")
    numbers = np.full(len(values), np.nan)
    numbers[given] = values[given].astype(np.float64)
    if np.isinf(numbers).any():
        raise ValueError(f"{place}: a value is infinite: replace it")
    return numbers
