"""Checks of the tests' calls against annotated axes."""

import collections
import functools
import inspect
import operator
import sys
from collections.abc import Callable
from typing import ParamSpec, TypeVar

from beartype import beartype
from sklearn.base import BaseEstimator

P = ParamSpec("P")
T = TypeVar("T")
MOST = 10
"""Checks of a function in each test: one of a call's arguments, one of its result.

Some functions run for every value of a table, every parameter of a model, or hundreds of thousands
of times in a fit by EM: checking all calls would take a sixth of the time of the tests.
"""
_checks: collections.Counter[tuple[str, str]] = collections.Counter()
_unchecked: set[Callable[..., object]] = set()


def checked(signature: Callable[P, T]) -> Callable[P, T]:
    """A type checker for jaxtyping that checks a function ``MOST`` times in each test.

    jaxtyping calls it with a function that has the signature of the annotated one and no body, and
    checks no call of an annotated function that has the attribute ``__no_type_check__``. Estimators
    take any value when they are made and check it in ``fit``, as scikit-learn asks of them.
    """
    check = beartype(signature)
    name = signature.__module__, signature.__qualname__

    @functools.wraps(signature)
    def counted(*args: P.args, **kwargs: P.kwargs) -> T:
        if name[1].endswith(".__init__") and isinstance(
            [*args, *kwargs.values()][0], BaseEstimator
        ):
            return signature(*args, **kwargs)
        _checks[name] += 1  # more than MOST are counted where threads call at once
        if _checks[name] >= MOST and "<locals>" not in name[1]:
            found = operator.attrgetter(name[1])(sys.modules[name[0]])
            annotated = inspect.unwrap(getattr(found, "fget", found))
            annotated.__no_type_check__ = True
            _unchecked.add(annotated)
        return check(*args, **kwargs)

    return counted


def check_again() -> None:
    """Checks the next calls of every function, as at the start of each test."""
    _checks.clear()
    while _unchecked:
        del _unchecked.pop().__no_type_check__
