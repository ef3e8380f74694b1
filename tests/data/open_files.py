"""A temporary read error for the tests of readers: there are too many open files."""

import contextlib
import gc
import os
import resource
from collections.abc import Iterator
from types import SimpleNamespace

import pytest

from vmoe.host import retry


@contextlib.contextmanager
def no_more_files(*, until_retry: bool = False) -> Iterator[None]:
    """This process cannot open files: it has as many open as it may.

    Args:
        until_retry: until a failed read waits to be tried again.
    """
    opened: list[int] = []

    def close(_: float = 0) -> None:
        while opened:
            os.close(opened.pop())

    sleep = close if until_retry else lambda _: None
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    try:
        gc.disable()  # else it may close files of earlier tests meanwhile
        opened.append(os.open(os.devnull, os.O_RDONLY))
        resource.setrlimit(resource.RLIMIT_NOFILE, (opened[0] + 50, hard))
        with contextlib.suppress(OSError):
            while True:
                opened.append(os.open(os.devnull, os.O_RDONLY))
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(retry, "time", SimpleNamespace(sleep=sleep))
            yield
    finally:
        gc.enable()
        close()
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
