"""Counts and reports images that could not be read, or not by the fast decoder."""

import os
from collections.abc import Sequence
from pathlib import Path

from vmoe.data.files import read_bytes
from vmoe.errors import one_line, writing
from vmoe.host.retry import read_regular
from vmoe.workdir.layout import append_bytes

SHOWN = 20  # lines for images, if no file lists them


class Unreadable:
    """The images that could not be read when batches were made.

    Args:
        instead: how these images were handled, such as "left out".
        file: lists all of them, a line for each; if None, each of the first ones is a message. Only
            one process may give it.
    """

    def __init__(self, instead: str, file: Path | None = None) -> None:
        self._instead, self._file = instead, file
        self._reasons: dict[str, None] = {}  # without duplicates, in the order of arrival
        self._reported = self._listed = 0
        if file is not None and file.exists():  # by an earlier part of the run
            content = read_bytes(file, read_regular)
            whole = content[: content.rfind(b"\n") + 1]
            if len(whole) < len(content):  # its end was lost; the next line must not join the rest
                with writing(file):
                    os.truncate(file, len(whole))
            self._reasons = dict.fromkeys(whole.decode(errors="replace").splitlines())
            self._reported = self._listed = len(self._reasons)

    def add(self, reason: str) -> None:
        """Adds an image; the reason contains its origin."""
        self._reasons[one_line(reason)] = None

    @property
    def new(self) -> list[str]:
        """The reasons that ``news`` has not returned or listed."""
        return list(self._reasons)[self._listed :]

    def news(self) -> list[str]:
        """Lines about the images that no earlier call has returned.

        With a file there is one line whenever the number of images has doubled.

        Raises:
            OSError: the file cannot be written.
        """
        new, count = self.new, len(self._reasons)
        start = self._listed
        if self._file is None:
            self._listed = count
            shown = new[: max(0, SHOWN - start)]
            lines = [f"{x}; {self._instead} ({i:,} so far)" for i, x in enumerate(shown, start + 1)]
            more = len(new) - len(shown)
            return lines + [f"{more:,} more images cannot be read; {self._instead}"] * bool(more)
        if not new:
            return []
        append_bytes(self._file, "".join(f"{reason}\n" for reason in new).encode())
        self._listed = count
        if count < 2 * self._reported:
            return []
        self._reported = count
        listed = f"; {self._file} lists them" * (count > 1)
        return [f"{new[-1]}; {self._instead} ({count:,} so far{listed})"]


class Refused:
    """Counts, over all epochs, how often the fast decoder did not support an image."""

    def __init__(self) -> None:
        self._count, self._next, self._example = 0, 1, ""

    def add(self, origins: Sequence[str]) -> None:
        """Adds images by their origins."""
        self._count += len(origins)
        self._example = origins[-1] if origins else self._example

    def news(self) -> list[str]:
        """A line if the number has doubled since the last one."""
        if self._count < self._next:
            return []
        self._next = 2 * self._count
        return [
            f"{self._example}: not supported by the fast decoder; decoded exactly "
            f"({self._count:,} {'time' if self._count == 1 else 'times'} so far)"
        ]
