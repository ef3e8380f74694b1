"""The standard streams of a process that outlives its terminal or starts without one.

Standard library only, so that it can be imported before anything else.
"""

import contextlib
import io
import os
import sys
from collections.abc import Iterator
from typing import Any, TextIO, cast


class LossyStream:
    """A wrapper of a text stream that drops text that cannot be written.

    Attributes:
        lost: the reason why the first dropped text could not be written; empty if none was.
    """

    def __init__(self, stream: "TextIO | LossyStream"):
        self._stream = stream._stream if isinstance(stream, LossyStream) else stream
        self.lost = ""

    def write(self, text: str) -> int:
        """Writes a text, or drops it."""
        with self._dropping():
            self._stream.write(text)
        return len(text)

    def flush(self) -> None:
        """Writes the buffered text, or drops it."""
        with self._dropping():
            self._stream.flush()

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)

    @contextlib.contextmanager
    def _dropping(self) -> Iterator[None]:
        try:
            yield
        except (OSError, ValueError) as error:  # ValueError: the stream was closed
            self.lost = self.lost or getattr(error, "strerror", None) or str(error)


def prepare() -> None:
    """Prepares the standard streams of a command.

    Messages on stderr that cannot be written are dropped; the work continues. A closed stream is
    replaced, so that no file of the command gets its number: the new stdout drops everything, and
    the new stderr fails, like a closed terminal. Characters that an encoding lacks are escaped.
    """
    for name in ("stdin", "stdout", "stderr"):
        if getattr(sys, name) is None:
            null = os.open(os.devnull, os.O_WRONLY if name == "stdout" else os.O_RDONLY)
            setattr(sys, name, os.fdopen(null, "r" if name == "stdin" else "w"))
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")
    sys.stderr = cast(TextIO, LossyStream(sys.stderr))
