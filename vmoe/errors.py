"""Expected errors: each message is one line that says what to do.

The command line prints the message and exits with ``status``. Any other exception is a bug and
shows its traceback.
"""

import contextlib
import dataclasses
import difflib
import errno
import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any, Self

OUT_OF_MEMORY = "out of memory"
_FREE, _IN_THE_WAY = "free some space and", "move what is there away, and"
_WRITABLE = {  # what to do before a file can be written again
    errno.ENOSPC: _FREE,
    errno.EDQUOT: _FREE,
    errno.EFBIG: "raise the limit on the size of files, and",
    errno.ENOENT: "put its folder back, and",
    errno.EEXIST: _IN_THE_WAY,
    errno.EISDIR: _IN_THE_WAY,
    errno.ENOTDIR: _IN_THE_WAY,
    errno.ELOOP: _IN_THE_WAY,
}
_OUT_OF_MEMORY = ("RESOURCE_EXHAUSTED", "Out of memory")  # in errors of XLA


class VmoeError(Exception):
    """Base of the errors below; the message is one line.

    Attributes:
        fields: values of fields or arguments that are wrong, by their paths in a ``TrainConfig``,
            such as "model.moe.router.k", or their names.
        remedies: values that help, in the same form; None for any other value.
    """

    status = 1
    fields: dict[str, Any] = {}
    remedies: dict[str, Any] = {}

    def remedied_by(self, **fields: Any) -> Self:
        """This error, with remedies; the command line adds their options to the message."""
        self.remedies = fields
        return self


class UsageError(VmoeError, ValueError):
    """Wrong input: the message has the location, the value and the remedy.

    Attributes:
        field: the field or argument that is wrong; None if the message has another location.
        value: its value.
    """

    status = 2

    def __init__(self, problem: str, /, **fields: Any):
        """In ``fields`` the wrong field comes first, then the fields that it conflicts with.

        >>> str(UsageError("use fewer", **{"optim.warmup_steps": 20, "steps": 10}))
        'optim.warmup_steps=20 with steps=10: use fewer'
        """
        super().__init__(f"{_place(fields)}: {problem}" if fields else problem)
        self.fields = fields
        self.field, self.value = next(iter(fields.items()), (None, None))


class Failure(VmoeError):
    """The work failed: a loss that is not finite, a full disk, a corrupt checkpoint."""


class CheckFailed(VmoeError):
    """A check that the user requested found a problem."""

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
        self.fields, self.remedies = cause.fields, cause.remedies


def is_out_of_memory(error: BaseException) -> bool:
    """Whether Python or XLA could not allocate memory."""
    return isinstance(error, MemoryError) or any(text in str(error) for text in _OUT_OF_MEMORY)


def require(condition: bool, problem: str, /, **fields: Any) -> None:
    """Raises a ``UsageError(problem, **fields)`` unless the condition holds."""
    if not condition:
        raise UsageError(problem, **fields)


def _place(fields: Mapping[str, Any]) -> str:
    """Fields and their values as text, without configs, which are long."""
    texts = []
    for path, value in fields.items():
        configs = value if isinstance(value, tuple) else (value,)
        texts.append(path if any(map(dataclasses.is_dataclass, configs)) else f"{path}={value}")
    first, *others = texts
    return f"{first} with {' and '.join(others)}" if others else first


@contextlib.contextmanager
def naming(place: Any = "", /, **fields: Any) -> Iterator[None]:
    """Puts a location, such as a path or an argument, before the message of a UsageError inside."""
    try:
        yield
    except UsageError as error:
        error.args = (f"{place or _place(fields)}: {error}",)
        error.fields = error.fields | fields
        raise


@contextlib.contextmanager
def writing(path: Any, remedy: str = "") -> Iterator[None]:
    """Turns an OSError inside into a Failure whose message has the path.

    Args:
        remedy: what to do once the path can be written again, such as "run the same command".
    """
    try:
        yield
    except OSError as error:
        reason = error.strerror or error
        if remedy:
            remedy = f"; {_WRITABLE.get(error.errno or 0, 'once that is resolved,')} {remedy}"
        raise Failure(f"{path}: cannot be written ({reason}){remedy}") from error


@contextlib.contextmanager
def reading(place: Any, problem: str = "cannot be read", remedy: str = "") -> Iterator[None]:
    """Turns any exception of a library inside into a UsageError whose message has the location.

    The errors above, and a MemoryError, are passed on.

    Args:
        place: the location, such as a path.
        problem: the problem, in words.
        remedy: the end of the message, such as "; repair it".
    """
    try:
        yield
    except (VmoeError, MemoryError):
        raise
    except Exception as error:
        raise UsageError(f"{place}: {problem} ({one_line(str(error))}){remedy}") from None


def parse_json(text: str | bytes) -> Any:
    """The value of a JSON text.

    Raises:
        ValueError: it is not JSON, an object has a field twice, or it is nested too deeply for
            Python's parser.
    """
    try:
        return json.loads(text, object_pairs_hook=_object)
    except RecursionError:
        raise ValueError("its lists or objects are nested too deeply") from None


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """A JSON object; ``json.loads`` would keep the last value of a field that occurs twice."""
    fields = dict(pairs)
    if len(fields) < len(pairs):
        raise ValueError(f"the field {repeated(name for name, _ in pairs)!r} occurs twice")
    return fields


def repeated(names: Iterable[str]) -> str | None:
    """The first name that occurs again; None if there is none.

    >>> repeated(["path", "label", "path"]), repeated(["path", "label"])
    ('path', None)
    """
    seen = set[str]()
    for name in names:
        if name in seen:
            return name
        seen.add(name)
    return None


def one_line(text: str) -> str:
    """The text with unprintable characters escaped: file names can contain any character.

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
    """The first texts, and the number of further ones, which includes ``unnamed`` texts not given.

    >>> listed(["a", "b", "c"], 2), listed(["a", "b"], 2)
    ('a, b, and 1 more', 'a, b')
    """
    rest = len(texts) + unnamed - limit
    more = [f"and {rest:,} more"] if rest > 0 else []
    return separator.join([*texts[:limit], *more])


def one_of(choices: Sequence[object]) -> str:
    """Choices as text.

    >>> one_of([1, 2, 4])
    '1, 2 or 4'
    """
    return ", ".join(map(str, choices[:-1])) + (" or " if choices[1:] else "") + str(choices[-1])


def unknown(what: str, name: Any, known: list[str]) -> str:
    """A message for a name that does not exist, with the most similar name that does.

    >>> unknown("no data set", "digit", ["digits", "folder"])
    "no data set 'digit': did you mean 'digits'?"
    """
    return f"{what} {name!r}: {choice(name, known)}"


def choice(name: Any, known: list[str], *, otherwise: str = "") -> str:
    """The remedy for a name that does not exist: the most similar existing name, or all names.

    Args:
        otherwise: the remedy if no name is similar, instead of all names.
    """
    near = difflib.get_close_matches(str(name), known, n=1)
    shown = ", ".join(known[:12]) + (", ..." if len(known) > 12 else "")
    return f"did you mean {near[0]!r}?" if near else otherwise or f"choose from {shown}"
