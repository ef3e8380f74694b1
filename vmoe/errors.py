"""Expected errors: each message is one line that says what to do.

The command line prints the message and exits with ``status``. Any other exception is a bug and
shows its traceback.
"""

import contextlib
import difflib
import json
from collections.abc import Iterator, Sequence
from typing import Any

OUT_OF_MEMORY = "out of memory; lower the batch size, the image size or the model's width"


class VmoeError(Exception):
    """Base of the errors below; the message is one line."""

    status = 1


class UsageError(VmoeError, ValueError):
    """Wrong input: the message names the value, the place and the remedy."""

    status = 2


class Failure(VmoeError):
    """The work failed: a loss that is not finite, a full disk, a corrupt checkpoint."""


class CheckFailed(VmoeError):
    """A check that was asked for found what it looks for."""

    status = 3


class Stopped(VmoeError):
    """A signal stopped a run early, after a checkpoint was saved; raised in every process."""

    status = 75


class SynchronizedError(VmoeError):
    """An error that every process of a run raises, so that all of them can end normally.

    Attributes:
        cause: the error as one process raised it.
        status: the exit status of the cause.
    """

    def __init__(self, cause: VmoeError):
        super().__init__(str(cause))
        self.cause = cause
        self.status = cause.status


@contextlib.contextmanager
def naming(place: Any) -> Iterator[None]:
    """Puts a place, such as a path, before the message of a UsageError that is raised inside."""
    try:
        yield
    except UsageError as error:
        raise UsageError(f"{place}: {error}") from None


@contextlib.contextmanager
def writing(path: Any, remedy: str = "") -> Iterator[None]:
    """Turns an OSError inside into a Failure that names what cannot be written.

    Args:
        remedy: the end of the message, such as "; free some space".
    """
    try:
        yield
    except OSError as error:
        reason = error.strerror or error
        raise Failure(f"{path}: cannot be written ({reason}){remedy}") from error


def parse_json(text: str | bytes) -> Any:
    """The value of a JSON text.

    Raises:
        ValueError: it is no JSON, or too deep for Python's parser.
    """
    try:
        return json.loads(text)
    except RecursionError:
        raise ValueError("its lists or objects are nested too deeply") from None


def one_line(text: str) -> str:
    """The text with every character escaped that is not printable: names can hold any.

    >>> one_line("a\\nb")
    'a\\\\nb'
    """
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)


def shortened(text: str, limit: int) -> str:
    """The text, without its middle if it has more characters than the limit.

    >>> shortened("0123456789", 6)
    '012 ... 789'
    """
    half = limit // 2
    return text if len(text) <= limit else f"{text[:half]} ... {text[-half:]}"


def listed(texts: Sequence[str], limit: int, *, separator: str = ", ", unnamed: int = 0) -> str:
    """The first texts, and how many more there are, with ``unnamed`` that are not given.

    >>> listed(["a", "b", "c"], 2), listed(["a", "b"], 2)
    ('a, b, and 1 more', 'a, b')
    """
    rest = len(texts) + unnamed - limit
    more = [f"and {rest:,} more"] if rest > 0 else []
    return separator.join([*texts[:limit], *more])


def unknown(what: str, name: Any, known: list[str]) -> str:
    """A message for a name that does not exist, with the nearest one that does.

    >>> unknown("no data set", "digit", ["digits", "folder"])
    "no data set 'digit': did you mean 'digits'?"
    """
    near = difflib.get_close_matches(str(name), known, n=1)
    shown = ", ".join(known[:12]) + (", ..." if len(known) > 12 else "")
    hint = f"did you mean {near[0]!r}?" if near else f"choose from {shown}"
    return f"{what} {name!r}: {hint}"
