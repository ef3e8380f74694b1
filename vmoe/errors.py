"""What can go wrong that is nobody's bug: each message is one line that says what to do.

The command line prints it and exits with ``status``; a traceback is for what is not foreseen.
"""

import difflib
from typing import Any

OUT_OF_MEMORY = "out of memory; lower the batch size, the image size or the model's width"


class VmoeError(Exception):
    """Any of those below; the message is one line."""

    status = 1
    agreed = False
    """Whether every process of a run raises it alike, so that all may end in the usual way."""


class UsageError(VmoeError):
    """A user's mistake: the message says what, where and what to do instead."""

    status = 2


class Failure(VmoeError):
    """The work failed: a loss that is no number, a full disk, a damaged checkpoint."""


class Stopped(VmoeError):
    """A signal stopped the work early and everything is saved: the same line goes on."""

    status = 75
    agreed = True


def unknown(what: str, name: Any, known: list[str]) -> str:
    """One line about a name that does not exist, with the nearest that does."""
    near = difflib.get_close_matches(str(name), known, n=1)
    shown = ", ".join(known[:12]) + (", ..." if len(known) > 12 else "")
    hint = f"did you mean {near[0]!r}?" if near else f"there are {shown}"
    return f"{what} {name!r}: {hint}"
