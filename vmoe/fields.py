"""The base class of all configs, which checks every field against its annotation."""

import dataclasses
import functools
import operator
import types
import typing
from collections.abc import Callable, Collection, Iterator, Mapping
from typing import Annotated, Any, Literal, NamedTuple, TypeVar

from vmoe.errors import UsageError, choice, require, unknown

LARGEST_FLOAT = (2 - 2**-23) * 2.0**127  # of float32
LARGEST_INT = 2**63 - 1  # of 64 bits
LARGEST_COUNT = 2**31 - 1  # XLA's counters have 32 bits

_UNION = (types.UnionType, typing.Union)


class Bound(NamedTuple):
    """A condition on a field, as data in its annotated type: ``Annotated[int, at_least(1)]``."""

    remedy: str
    holds: Callable[[Any], bool]

    def check(self, **arguments: Any) -> None:
        """Raises a UsageError unless it holds for the arguments of a function, given by name."""
        for name, value in arguments.items():
            require(self.holds(value), self.remedy, **{name: value})


def at_least(limit: int | float) -> Bound:
    return Bound(f"use at least {limit}", lambda value: value >= limit)


def at_most(limit: int | float) -> Bound:
    return Bound(f"use at most {limit}", lambda value: value <= limit)


def more_than(limit: int | float) -> Bound:
    return Bound(f"use more than {limit}", lambda value: value > limit)


def less_than(limit: int | float) -> Bound:
    return Bound(f"use less than {limit}", lambda value: value < limit)


NOT_EMPTY = Bound("give at least one", bool)

Count = Annotated[int, at_least(1), at_most(LARGEST_COUNT)]
Seed = Annotated[int, at_least(0), less_than(2**32)]
NonNegative = Annotated[float, at_least(0)]
Positive = Annotated[float, more_than(0)]
Rate = Annotated[float, at_least(0), less_than(1)]
"""A rate of dropout or decay."""


@dataclasses.dataclass(frozen=True)
class Checked:
    """A config whose fields have the annotated types and keep the bounds in them.

    Attributes:
        section: the path of the config in a ``TrainConfig``, for error messages.
    """

    section = ""

    def __post_init__(self) -> None:
        for name, kind, annotated in _annotations(type(self)):
            value = getattr(self, name)
            if not _fits(value, kind):
                self.require(False, _right_type(value, kind), name)
            for bound in _broken(value, annotated):
                self.require(False, bound.remedy, name)

    def require(self, condition: bool, problem: str, field: str, *others: str) -> None:
        """Raises a UsageError unless the condition holds.

        Args:
            problem: what is wrong, and the remedy.
            field: the field that is wrong, or its path, such as "router.k".
            others: the fields that it does not fit.
        """
        if not condition:
            paths = {f"{self.section}.{name}".lstrip("."): name for name in (field, *others)}
            values = {path: operator.attrgetter(name)(self) for path, name in paths.items()}
            raise UsageError(problem, **values)


def check_registered(configs: Collection[type], registry: Mapping[type, Any], name: str) -> None:
    """Checks that each config has an entry in a registry, and each entry a config."""
    for config in configs:
        if config not in registry:
            raise TypeError(f"{config.__name__} has no entry: add a line to {name}")
    for config in registry:
        if config not in configs:
            raise TypeError(f"{config.__name__} is in {name}: add it to the union of configs too")


Config = TypeVar("Config", bound=Checked)


def kinds(hint: Any) -> dict[str, type]:
    """The classes in the type of a field that have a ``kind``, by its value.

    For a base class, such as ``Router``, all its subclasses, yours too.

    >>> from vmoe.config import ExpertChoice, Switch
    >>> sorted(kinds(ExpertChoice | Switch | None))
    ['expert_choice', 'switch']
    """
    if inner := typing.get_args(hint):
        return {name: kind for each in inner for name, kind in kinds(each).items()}
    kind = getattr(hint, "__dict__", {}).get("kind")
    own = {kind: hint} if kind and isinstance(kind, str) else {}
    subclasses = getattr(hint, "__subclasses__", list)()
    return own | {name: kind for each in subclasses for name, kind in kinds(each).items()}


@functools.cache  # takes longer than all checks of a config
def _annotations(config: type) -> list[tuple[str, Any, Any]]:
    """Each field: its name, its type, and that type with its bounds."""
    annotated = typing.get_type_hints(config, include_extras=True)
    plain = typing.get_type_hints(config)
    names = [field.name for field in dataclasses.fields(config)]
    return [(name, plain[name], annotated[name]) for name in names]


def _fits(value: Any, kind: Any) -> bool:
    """Whether a value has an annotated type; an int is accepted as a float."""
    if typing.get_origin(kind) in _UNION:
        return any(_fits(value, member) for member in _members(kind))
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
    if isinstance(kind, type) and issubclass(kind, Checked):
        return isinstance(value, kind)
    return type(value) is kind


_DESCRIBED = {
    int: "an int of 64 bits",
    float: "a finite number of float32",
    bool: "True or False",
    str: "text",
}


def _members(kind: Any) -> tuple[Any, ...]:
    """The types of a union; one type alone."""
    return kind.__args__ if typing.get_origin(kind) in _UNION else (kind,)


def _right_type(value: Any, kind: Any) -> str:
    """The remedy for a value that does not have the annotated type."""
    names = []
    for member in _members(kind):
        if typing.get_origin(member) is Literal:
            return choice(value, list(member.__args__))
        if typing.get_origin(member) is tuple:
            element = member.__args__[0]
            if type(value) is tuple:
                return _right_type(next(x for x in value if not _fits(x, element)), element)
            literal = typing.get_origin(element) is Literal
            each = (
                map(repr, element.__args__) if literal else (x.__name__ for x in _members(element))
            )
            names.append(f"a tuple of {' or '.join(each)}")
        elif member is types.NoneType:
            names.append("None")
        else:
            article = "an" if member.__name__[0] in "AEIOU" else "a"
            name = f"{article} {member.__name__}"
            if known := [each.__name__ for each in kinds(member).values() if each is not member]:
                name += f" such as {known[0]}"
            names.append(_DESCRIBED.get(member, name))
    given = "" if type(value) in (int, float) else f", not {type(value).__name__}"
    return f"use {' or '.join(names)}{given}"


def _broken(value: Any, kind: Any) -> Iterator[Bound]:
    """The bounds in an annotated type that a value of this type, or an element of it, breaks."""
    if value is None:
        return
    in_tuple = typing.get_origin(kind) is tuple and isinstance(value, tuple)
    for part in typing.get_args(kind):
        if isinstance(part, Bound):
            yield from [] if part.holds(value) else [part]
        else:
            for each in value if in_tuple else (value,):
                yield from _broken(each, part)


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
            raise UsageError(unknown_field(type(config), name))
        if isinstance(value, dict):
            nested = getattr(config, name)
            if not dataclasses.is_dataclass(nested):
                raise UsageError(f"{name} of {type(config).__name__} has no fields to change")
            changes[name] = replace(nested, **value)
    return dataclasses.replace(config, **changes)


def unknown_field(kind: type, name: str, *, new: bool = False) -> str:
    """A message for a field that a config does not have, with the nested config that has it.

    Args:
        new: the config is new, so that a nested config cannot be changed by a dict.
    """
    fields = dataclasses.fields(kind)
    for own in fields:
        if name in getattr(own.default, "__dataclass_fields__", ()):
            nested = type(own.default).__name__ if new else "dict"
            return f"{kind.__name__} has no field {name!r}: use {own.name}={nested}({name}=...)"
    return unknown(f"{kind.__name__} has no field", name, [own.name for own in fields])
