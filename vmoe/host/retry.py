"""Reads that fail for a moment, such as while a file server restarts, are tried again."""

import errno
import io
import os
import stat
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

from vmoe.errors import Failure

PAUSES = (0.1, 0.5, 2.0)  # seconds before each further attempt
# Errors of the path or its permissions, where another attempt does not help. All others can pass:
# a stale handle, a time-out, too many open files, an error of the disk.
LASTING = frozenset(
    {
        errno.EACCES,
        errno.EEXIST,
        errno.EINVAL,
        errno.EISDIR,
        errno.ELOOP,
        errno.ENAMETOOLONG,
        errno.ENOENT,
        errno.ENOTDIR,
        errno.EPERM,
        errno.EROFS,
    }
)

T = TypeVar("T")


def retried(place: Any, read: Callable[[], T]) -> T:
    """Calls a function that reads a file, and calls it again after an error that can pass.

    Args:
        place: the file, for the error message.

    Raises:
        OSError: the error is of a kind that does not pass.
        Failure: the error did not pass.
    """
    pauses = iter(PAUSES)
    while True:
        try:
            return read()
        except OSError as error:
            if not can_pass(error):
                raise
            pause = next(pauses, None)
            if pause is None:
                raise failure(place, error) from None
            time.sleep(pause)


def open_retried(path: Path) -> io.BufferedReader:
    """Opens a file for reading; each read is ``retried``.

    The Failure of a read is no OSError, so it also passes through libraries that turn an OSError
    into an error about a wrong file.
    """
    return io.BufferedReader(retried(path, lambda: _RetriedFile(path)))


class _RetriedFile(io.FileIO):
    """A file whose reads are ``retried``."""

    def readinto(self, buffer: Any) -> int:
        return retried(self.name, lambda: os.readv(self.fileno(), [buffer]))

    readall = io.RawIOBase.readall  # by readinto


def open_regular(path: Any) -> io.BufferedReader:
    """Opens a file for reading, unless it is a pipe or a device, whose reading may never end.

    Raises:
        OSError: it cannot be opened, or is not a regular file.
    """
    return open(path, "rb", opener=_regular)


def read_regular(path: Any) -> bytes:
    """The content of a file; raises the errors of ``open_regular``."""
    with open_regular(path) as file:
        return file.read()


def _regular(path: Any, flags: int) -> int:
    if not stat.S_ISREG(os.stat(path).st_mode):
        raise OSError(errno.EINVAL, "not a regular file", os.fspath(path))
    return os.open(path, flags)


def can_pass(error: OSError) -> bool:
    """Whether another attempt may have another result."""
    return error.errno is not None and error.errno not in LASTING


def failure(place: Any, error: OSError) -> Failure:
    """The error for a file that cannot be read; the message says whether that can pass."""
    if can_pass(error):
        now, remedy = " now", "run the same command again when it can"
    elif error.errno in (errno.EACCES, errno.EPERM):
        now, remedy = "", "make it readable"
    else:
        now, remedy = "", "restore it, or move it away"
    return Failure(f"{place}: cannot be read{now} ({error.strerror}); {remedy}")
