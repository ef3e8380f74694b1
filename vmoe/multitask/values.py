"""Values of columns and of targets, as users give them."""

import datetime
import itertools
from collections.abc import Hashable, Sequence
from decimal import Decimal
from numbers import Real
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Bool, Float, Int

from vmoe.errors import UsageError

LISTS = (list, np.ndarray)


def as_values(place: str, given: Any) -> np.ndarray:
    """An array of the given values. The elements of a list keep their types; decimals are floats.

    Args:
        place: what the values are, for the error.
    """
    if hasattr(given, "__array__"):
        values = as_array(given)
    elif not isinstance(given, Sequence) or isinstance(given, str):
        raise ValueError(f"{place}: {type(given).__name__}: give an array or a list")
    else:
        values = exact(np.fromiter(given, object))
    if values.dtype.kind == "O":
        single = [_single(place, value) for value in values.ravel()]
        values = np.fromiter(single, object).reshape(values.shape)
    return values


def _single(place: str, value: Any) -> Any:
    """A value of an object array; a decimal as a float, a date of numpy or pandas as Python's.

    Times with a zone are those of UTC, in which equal ones have equal hashes.
    """
    if isinstance(value, str):  # most are
        return value
    if not isinstance(value, Hashable) or isinstance(value, tuple):
        raise ValueError(f"{place}: a value is a {type(value).__name__}: give single values")
    if isinstance(value, np.datetime64 | np.timedelta64):
        return as_list(np.asarray(value))[0]
    if hasattr(value, "to_pytimedelta"):
        return value.to_pytimedelta()
    if isinstance(value, datetime.datetime) and value == value:  # no NaT
        if hasattr(value, "to_pydatetime"):
            value = value.to_pydatetime(warn=False)
        try:
            return value if value.tzinfo is None else value.astimezone(datetime.UTC)
        except OverflowError:
            raise ValueError(f"{place}: {value!r} is out of the range of UTC: replace it") from None
    if not isinstance(value, Real | Decimal):
        return value
    try:
        number = float(value)
    except (OverflowError, ValueError) as error:  # 10**400, Decimal("sNaN")
        raise ValueError(f"{place}: a number has no float64 ({error}): replace it") from None
    return number if isinstance(value, Decimal) else value


def as_array(given: Any) -> np.ndarray:
    """An array; where a masked array, or one of pandas' or Arrow's, has no value, None or NaN.

    ``np.asarray`` would make floats of integers, some of which are missing, and so merge large
    ones.
    """
    given = as_pandas(given)
    if isinstance(given, np.ma.MaskedArray):
        missing, known = np.ma.getmaskarray(given), given.compressed()
    elif hasattr(given, "isna") and not isinstance(getattr(given, "dtype", None), np.dtype | None):
        missing = np.asarray(given.isna())
        known = np.asarray(given[~missing])
    else:
        return np.asarray(given)
    if not missing.any():
        return np.asarray(given)
    if known.dtype.kind == "f":
        values = np.full(missing.shape, np.nan, known.dtype)
        values[~missing] = known
        return values
    values = np.full(missing.shape, None, object)
    elements = list(known) if known.dtype.kind in "iub" else as_list(known)
    values[~missing] = np.fromiter(elements, object, len(elements))
    return values


def as_pandas(given: Any) -> Any:
    """Data of Arrow as pandas' own, in which integers stay integers; anything else as it is."""
    if type(given).__module__.partition(".")[0] != "pyarrow":
        return given
    try:
        import pandas as pd
    except ImportError:
        raise UsageError("data of pyarrow is read by pandas: pip install pandas") from None
    return given.to_pandas(
        types_mapper=lambda kind: (
            None if str(kind).startswith("dictionary") else pd.ArrowDtype(kind)
        )
    )


def exact(values: np.ndarray) -> np.ndarray:
    """An object array as numpy's type for its numbers, if this rounds none of them."""
    if values.dtype.kind != "O" or not all(isinstance(x, Real | np.bool_) for x in values):
        return values
    found = np.array(list(values))
    same = all(a == b or a != a for a, b in zip(found.tolist(), values, strict=True))
    return found if same else values


def as_list(values: np.ndarray) -> list[Any]:
    """The values as Python's own types, dates in microseconds (nanoseconds would be integers)."""
    if values.dtype.kind in "mM":
        values = values.astype(f"{values.dtype.kind}8[us]")
    return values.ravel().tolist()


def is_missing(values: np.ndarray) -> Bool[np.ndarray, "b"]:
    """Where a value is NaN, NaT, None or pandas' NA."""
    if values.dtype.kind == "O":
        return np.array([_is_none(x) for x in values], bool)
    return values != values  # NaN and NaT alone


class Distinct(NamedTuple):
    """A column by its distinct values.

    Attributes:
        values: the distinct values, none of which is missing.
        index: the index of each row's value; -1 where it is missing. In a column of lists the
            indices of each row's values, filled with -1.
        lists: whether it is a column of lists.
    """

    values: np.ndarray
    index: Int[np.ndarray, "b m"]
    lists: bool = False


def distinct(place: str, given: Any) -> Distinct:
    """The distinct values of a column, in the order of their first rows or sorted.

    Args:
        place: what the values are, for the error.
        given: a Series or an array (b,).
    """
    kind = str(given.dtype)
    if "list<" in kind or (kind == "object" and any(isinstance(x, LISTS) for x in given)):
        return _distinct_of_lists(place, given)
    if hasattr(given, "factorize"):
        try:
            index, values = given.factorize()  # -1 where missing
            return Distinct(as_values(place, values), index.astype(np.int32)[:, None])
        except TypeError:  # a value cannot be hashed, which as_values says
            pass
    values = as_values(place, given)
    known, index = ~is_missing(values), np.full((len(values), 1), -1, np.int32)
    if values.dtype.kind == "O":
        found: dict[Any, int] = {}
        index[known, 0] = [found.setdefault(value, len(found)) for value in values[known]]
        return Distinct(np.fromiter(found, object), index)
    values, index[known, 0] = np.unique(values[known], return_inverse=True)
    return Distinct(values, index)


def _distinct_of_lists(place: str, given: Any) -> Distinct:
    rows = [[] if _is_none(row) else row for row in given]
    for row in rows:
        if not isinstance(row, LISTS):
            raise ValueError(f"{place}: {row!r} is no list, as other values are: give lists")
    rows = [[value for value in row if not _is_none(value)] for row in rows]
    flat = np.fromiter(itertools.chain.from_iterable(rows), object)
    values, index, _ = distinct(place, exact(flat))
    sizes = np.array([len(row) for row in rows])
    # A power of two of places: few programs are compiled, however long the lists are.
    places = 1 << (max(1, int(sizes.max())) - 1).bit_length()
    found = np.full((len(rows), places), -1, np.int32)
    found[np.arange(found.shape[1]) < sizes[:, None]] = index[:, 0]
    return Distinct(values, found, lists=True)


def is_category(given: Any) -> bool:
    """Whether a column or a target has pandas' type "category"."""
    return getattr(getattr(given, "dtype", None), "name", None) == "category"


def _is_none(value: Any) -> bool:
    if value is None or type(value).__name__ == "NAType":
        return True
    return not isinstance(value, LISTS) and bool(value != value)


def is_numeric(values: np.ndarray) -> bool:
    """Whether all values that are not missing are numbers. Booleans are not."""
    if values.dtype.kind != "O":
        return values.dtype.kind in "iuf"
    return all(isinstance(x, Real) and not isinstance(x, bool) for x in values[~is_missing(values)])


def type_of(place: str, values: np.ndarray) -> str | None:
    """The type of all values; "number" for booleans and all numbers, None if all are missing.

    Args:
        place: what the values are, for the error.
    """
    given = as_list(values[~is_missing(values)])
    if not given or values.dtype.kind in "iufb":
        return "number" if given else None
    kinds = {(type(x), getattr(x, "tzinfo", None) is None): x for x in given}
    found = {_type_name(x): x for x in kinds.values()}
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


def _type_name(value: Any) -> str:
    if isinstance(value, Real | np.bool_):
        return "number"
    kind = str if isinstance(value, str) else type(value)  # np.str_
    zone = " with a time zone" if getattr(value, "tzinfo", None) else ""
    return kind.__name__ + zone


def as_numbers(place: str, values: np.ndarray, remedy: str) -> Float[np.ndarray, "b"]:
    """Values as float64; NaN for missing ones.

    Args:
        place: what the values are, for the error.
        remedy: what to do if they are not numbers.
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
