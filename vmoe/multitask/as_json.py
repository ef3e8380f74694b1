"""Settings, categories and classes as JSON and back, each with its type.

None, booleans, integers, floats, strings and lists are themselves, anything else is an object with
one field, whose name is the type. Arrays have one axis.
"""

import datetime
import re
from collections.abc import Mapping
from typing import Any

import numpy as np

DATES: dict[str, type] = {
    "datetime": datetime.datetime,
    "date": datetime.date,
    "time": datetime.time,
}


def to_json(place: str, value: Any) -> Any:
    """A value as what ``json.dumps`` writes.

    Args:
        place: what the value is, for the error.

    Raises:
        ValueError: it has a type that cannot be read back.
    """
    if isinstance(value, np.generic) and value.dtype.kind in "iufbU":
        value = value.item()
    if value is None or type(value) in (bool, int, float, str):
        return value
    if isinstance(value, np.ndarray) and value.ndim == 1:
        dtype = {"U": "U", "T": "|O"}.get(value.dtype.kind, value.dtype.str)
        return {"array": [dtype, to_json(place, _items(value))]}
    if type(value) is list:
        return [to_json(place, each) for each in value]
    if type(value) is tuple:
        return {"tuple": [to_json(place, each) for each in value]}
    if isinstance(value, Mapping):
        return {"dict": [[to_json(place, each) for each in pair] for pair in value.items()]}
    for name, kind in DATES.items():
        if type(value) is kind:
            return {name: value.isoformat()}
    if type(value) is datetime.timedelta:
        return {"timedelta": [value.days, value.seconds, value.microseconds]}
    raise ValueError(
        f"{place}: {value!r:.100} is a {type(value).__name__}, which cannot be saved, since a file "
        "has no code: use numbers, strings, dates, lists and dicts of these"
    )


def _items(array: np.ndarray) -> list[Any]:
    return (array.view("i8") if array.dtype.kind in "mM" else array).tolist()


def from_json(given: Any) -> Any:
    """The value that ``to_json`` wrote.

    Raises:
        ValueError, TypeError, KeyError: it wrote no such thing.
    """
    if isinstance(given, list):
        return [from_json(each) for each in given]
    if not isinstance(given, dict):
        return given
    ((kind, content),) = given.items()
    if kind in DATES:
        return DATES[kind].fromisoformat(content)
    values = [from_json(each) for each in content]
    match kind:
        case "tuple":
            return tuple(values)
        case "dict":
            return dict(values)
        case "timedelta":
            return datetime.timedelta(*values)
        case "array":
            if not re.fullmatch(r"U|\|O|[<>|][biufmM]\d{1,2}(\[\w{1,8}\])?", values[0]):
                raise ValueError(f"{values[0]!r:.40} is no type of an array")
            dtype = np.dtype(values[0])
            if dtype.kind == "O":
                found = np.empty(len(values[1]), object)
                found[:] = values[1]
                return found
            found = np.array(values[1], "i8" if dtype.kind in "mM" else dtype)
            return found.view(dtype) if dtype.kind in "mM" else found
    raise ValueError(f"{kind!r:.20} is no type of a value")
