"""What can go wrong that is nobody's bug: each message is one line that says what to do.

The command line prints it and exits with ``status``; a traceback is for what is not foreseen.
"""


class VmoeError(Exception):
    """Any of those below; the message is one line."""

    status = 1


class UsageError(VmoeError):
    """A user's mistake: the message says what, where and what to do instead."""

    status = 2


class Failure(VmoeError):
    """The work failed: a loss that is no number, a full disk, a damaged checkpoint."""


class Stopped(VmoeError):
    """A signal stopped the work early and everything is saved: the same line goes on."""

    status = 75
