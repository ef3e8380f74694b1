"""A temporary read error for the tests of readers: there are too many open files."""

import contextlib
import os
import resource
import threading
from collections.abc import Iterator


@contextlib.contextmanager
def no_more_files(seconds: float) -> Iterator[None]:
    """For some time this process cannot open files: it has as many open as it may."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    opened = [os.open(os.devnull, os.O_RDONLY)]
    resource.setrlimit(resource.RLIMIT_NOFILE, (opened[0] + 50, hard))
    with contextlib.suppress(OSError):
        while True:
            opened.append(os.open(os.devnull, os.O_RDONLY))

    def close() -> None:
        while opened:
            os.close(opened.pop())

    timer = threading.Timer(seconds, close)
    timer.start()
    try:
        yield
    finally:
        timer.cancel()
        close()
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
