"""The base class of all configs, which checks every field against its annotated type."""

import dataclasses
import types
import typing
from typing import Any, Literal, TypeVar

from vmoe.errors import UsageError, unknown

LARGEST_FLOAT = (2 - 2**-23) * 2.0**127  # of float32
LARGEST_INT = 2**63 - 1  # of 64 bits
LARGEST_COUNT = 2**31 - 1  # XLA's counters have 32 bits

_UNION = (types.UnionType, typing.Union)


@dataclasses.dataclass(frozen=True)
class Checked:
    """A config whose fields have the annotated types; ints fit into 64 bits, floats into float32.

    Attributes:
        section: the place of the config in a ``TrainConfig``, for error messages.
    """

    section = ""

    def __post_init__(self) -> None:
        for name, kind in typing.get_type_hints(type(self)).items():
            value, place = getattr(self, name), f"{self.section}.{name}".lstrip(".")
            choices = [
                c for k in _kinds(kind) if typing.get_origin(k) is Literal for c in k.__args__
            ]
            if choices and value not in choices and not _fits(value, kind):
                raise UsageError(unknown(f"{place} cannot be", value, choices))
            require(_fits(value, kind), f"{place} must be {_described(kind)}, not {value!r}")


Config = TypeVar("Config", bound=Checked)


def _kinds(kind: Any) -> tuple[Any, ...]:
    """The members of a union; any other type as a tuple of one."""
    return kind.__args__ if typing.get_origin(kind) in _UNION else (kind,)


def _fits(value: Any, kind: Any) -> bool:
    """Whether a value has an annotated type; an int is accepted as a float."""
    if typing.get_origin(kind) in _UNION:
        return any(_fits(value, member) for member in kind.__args__)
    if typing.get_origin(kind) is Literal:
        return value in kind.__args__
    if typing.get_origin(kind) is tuple:
        return type(value) is tuple and all(_fits(element, kind.__args__[0]) for element in value)
    if typing.get_origin(kind) is dict:
        of_key, of_value = kind.__args__
        return type(value) is dict and all(
            _fits(key, of_key) and _fits(element, of_value) for key, element in value.items()
        )
    if kind is float:
        return type(value) in (int, float) and abs(value) <= LARGEST_FLOAT  # False for nan
    if kind is int:
        return type(value) is int and abs(value) <= LARGEST_INT
    return type(value) is kind


_DESCRIBED = {
    int: "an int of 64 bits",
    float: "a finite number of float32",
    bool: "True or False",
    str: "text",
}


def _described(kind: Any) -> str:
    names = []
    for member in _kinds(kind):
        if typing.get_origin(member) is tuple:
            names.append(f"a tuple of {member.__args__[0].__name__}")
        elif member is types.NoneType:
            names.append("None")
        elif typing.get_origin(member) is not Literal:
            article = "an" if member.__name__[0] in "AEIOU" else "a"
            names.append(_DESCRIBED.get(member, f"{article} {member.__name__}"))
    return " or ".join(names)


def require(condition: bool, message: str) -> None:
    """Raises a UsageError with the message unless the condition holds."""
    if not condition:
        raise UsageError(message)


def require_count(name: str, value: int) -> None:
    """Raises a UsageError unless the value of a field is a count, from 1 to 2147483647."""
    require(value >= 1, f"{name}={value}: use at least 1")
    require(value <= LARGEST_COUNT, f"{name}={value}: use at most {LARGEST_COUNT}")


def require_rate(name: str, value: float) -> None:
    """Raises a UsageError unless the value of a field is a dropout rate, in [0, 1)."""
    require(0 <= value < 1, f"{name}={value}: a dropout rate must be in [0, 1)")


def replace(config: Config, **changes: Any) -> Config:
    """``dataclasses.replace``, with a dict for the fields of a nested config.

    Raises:
        UsageError: no such field, or incompatible values.

    >>> from vmoe.config import ViTConfig
    >>> replace(ViTConfig(), moe=dict(router=dict(k=1))).moe.router.k
    1
    """
    known = [field.name for field in dataclasses.fields(config)]
    for name, value in changes.items():
        if name not in known:
            raise UsageError(unknown(f"{type(config).__name__} has no field", name, known))
        if isinstance(value, dict):
            nested = getattr(config, name)
            if not dataclasses.is_dataclass(nested):
                raise UsageError(f"{name} of {type(config).__name__} has no fields to change")
            changes[name] = replace(nested, **value)
    return dataclasses.replace(config, **changes)
