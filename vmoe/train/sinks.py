"""Reports of a run (``Entry``), and where they are written (``Sink``): CSV files and TensorBoard.

To add a sink, write a subclass of ``Sink`` with ``write``, and add a line to ``Report``.
"""

import contextlib
import csv
import functools
import hashlib
import io
import os
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from tensorboardX.event_file_writer import EventsWriter
from tensorboardX.proto.event_pb2 import Event, SessionLog
from tensorboardX.summary import image, scalar

from vmoe.errors import Failure, one_line, writing
from vmoe.host.retry import failure, read_regular, retried
from vmoe.train.pictures import Picture
from vmoe.workdir.layout import append_bytes, set_aside

Row = dict[str, Any]


class Entry(NamedTuple):
    """A report about one step; each part may be empty.

    Attributes:
        rows: rows of CSV files, by the name of the file.
        scalars: scalars by tag.
        pictures: pictures by tag.
        texts: the parts of a line for the console.
        passing: whether a terminal replaces the line by the next one.
    """

    rows: Mapping[str, Sequence[Row]] = {}
    scalars: Mapping[str, Any] = {}
    pictures: Mapping[str, Picture] = {}
    texts: Sequence[str] = ()
    passing: bool = False


class Sink(contextlib.AbstractContextManager["Sink"]):
    """A destination of entries. A method that a subclass does not override does nothing.

    ``vmoe.train.train(..., sinks=[...])`` adds your own, such as a monitor of the experts' loads.
    The rows of "experts.csv" in an entry have the load and importance of each expert.
    """

    def resume(self, step: int) -> None:
        """The run continues after a step; the entries of later steps will be written again."""

    def write(self, step: int, entries: Sequence[Entry]) -> None:
        """Writes the entries of a step, which belong together."""

    def log(self, text: str) -> None:
        """The run has a message."""

    def step(self, step: int) -> None:
        """A step was dispatched."""

    def activity(self, text: str) -> None:
        """The run does something other than steps; the text is empty when this ends."""

    def close(self, error: BaseException | None) -> None:
        """The run ends, with an error or None."""

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: object
    ) -> None:
        self.close(error)


class Position(NamedTuple):
    """How much of a file was written: its bytes, and their SHA-256."""

    size: int
    sha256: str


write_errors = functools.partial(
    writing, remedy="run the same command to resume from the newest checkpoint"
)
ADDED = ("batch_size",)  # columns that older versions did not write
START = Position(0, hashlib.sha256().hexdigest())


class CsvFile(Sink):
    """A CSV file whose first column is the step; the first row determines the other columns.

    A file of an older version keeps its columns, and gets none of those ``ADDED`` since.
    """

    def __init__(self, path: Path):
        self._path = path
        self._columns: list[str] = []
        self._size, self._hash = 0, hashlib.sha256()
        self.last_step: int | None = None

    def write(self, step: int, entries: Sequence[Entry]) -> None:
        """Writes the rows of the entries that are for this file; see ``append``."""
        self.append(step, [row for each in entries for row in each.rows.get(self._path.name, ())])

    def append(self, step: int, rows: Sequence[Row]) -> None:
        """Writes the rows of one step, all at once."""
        if not rows:
            return
        columns = ["step", *rows[0]]
        if self._columns:
            columns = [name for name in columns if name in self._columns or name not in ADDED]
        if self._columns and self._columns != columns:
            raise Failure(
                f"{self._path} has other columns: another version of vmoe wrote it; move it away, "
                "and run the same command to resume with a new one"
            )
        text = io.StringIO()
        writer = csv.DictWriter(text, columns, extrasaction="ignore")
        if not self._columns:
            writer.writeheader()
        writer.writerows({"step": step} | {k: _text(v) for k, v in r.items()} for r in rows)
        content = text.getvalue().encode()
        with write_errors(self._path):
            append_bytes(self._path, content)
        self._columns, self.last_step = columns, step
        self._size += len(content)
        self._hash.update(content)

    def position(self) -> Position:
        """The end of the file, all of which is on the disk."""
        if self._size:
            with write_errors(self._path), self._path.open("rb") as file:
                os.fsync(file.fileno())
        return Position(self._size, self._hash.hexdigest())

    def restore(self, step: int, position: Position) -> str:
        """Checks that the content of the file up to a position is unchanged.

        Does not change the file.

        Args:
            step: step of the checkpoint that recorded the position.

        Returns:
            a message if the file is missing, or started after the step; a new one starts then.

        Raises:
            Failure: the file is corrupt before the position, or cannot be read.
        """
        content, missing = b"", ""
        if position.size:
            content = self._stored
            if content is None:
                missing = f"{self._path} is missing: its rows up to step {step} are lost"
            elif _first_step(content) > step:
                content, missing = b"", f"{self._path} has lost its rows up to step {step}"
            content = (content or b"")[: position.size]
        self._hash = hashlib.sha256(content)
        if not missing and Position(len(content), self._hash.hexdigest()) != position:
            reason = "its content has changed"
            if len(content) < position.size:
                reason = f"cut off after {len(content):,} bytes"
            raise Failure(
                f"{self._path} is corrupt ({reason} since checkpoint {step} was saved): restore "
                "it, or move it away to continue with a new one, and run the same command to resume"
            )
        self._size = len(content)
        header, _, rows = content.partition(b"\n")
        self._columns = next(csv.reader([header.decode()]), [])
        self.last_step = _last_step(rows)
        return missing

    def has(self, position: Position) -> bool:
        """Whether the content of the file up to a position is unchanged."""
        content = (self._stored or b"")[: position.size]
        return Position(len(content), hashlib.sha256(content).hexdigest()) == position

    def stored_step(self) -> int:
        """The step of the last complete row on the disk; 0 if there is none."""
        return _last_step((self._stored or b"").partition(b"\n")[2]) or 0

    @functools.cached_property
    def _stored(self) -> bytes | None:
        """The content of the file; None if there is none. Read once until ``resume``.

        Raises:
            Failure: it cannot be read, or is a pipe or a device.
        """
        try:
            return retried(self._path, lambda: read_regular(self._path))
        except FileNotFoundError:
            return None
        except OSError as error:
            raise failure(self._path, error) from None

    def set_aside(self) -> str:
        """Renames the file, see ``vmoe.workdir.layout.set_aside``."""
        self.__dict__.pop("_stored", None)
        with write_errors(self._path):
            return set_aside(self._path)

    def resume(self, step: int) -> None:
        """Removes all content after the restored position."""
        self.__dict__.pop("_stored", None)
        with write_errors(self._path):
            if self._path.exists():
                os.truncate(self._path, self._size)


def _last_step(rows: bytes) -> int | None:
    """The step of the last complete row; None if there is none. No text in a row has a newline."""
    end = rows.rfind(b"\n")
    start = rows.rfind(b"\n", 0, max(end, 0)) + 1
    step = rows[start:end].split(b",")[0]
    return int(step) if end > 0 and step.isdigit() else None


def _first_step(content: bytes) -> int:
    """The step of the first row of a CSV file; -1 if it has none."""
    lines = content.split(b"\n", 2)
    first = lines[1].split(b",")[0] if len(lines) > 2 else b""
    return int(first) if first.isdigit() else -1


def _text(value: Any) -> str:
    """The text of a value in a CSV file; empty for None (unknown)."""
    if value is None:
        return ""
    return f"{value:.6g}" if isinstance(value, float | np.floating) else one_line(str(value))


class TensorBoard(Sink):
    """TensorBoard events, written synchronously: tensorboardX's writer thread loses errors."""

    def __init__(self, folder: Path):
        self._folder = folder
        self._writer: EventsWriter | None = None

    def resume(self, step: int) -> None:
        """Starts a new file; TensorBoard then discards the later steps of older files."""
        self.close()
        with write_errors(self._folder):
            self._folder.mkdir(exist_ok=True)
            # tensorboardX names files by the second, so the suffix makes the name unique.
            self._writer = EventsWriter(str(self._folder / "events"), f".{time.time_ns()}")
            start = SessionLog(status=SessionLog.START)
            self._writer.write_event(Event(step=step + 1, session_log=start))
            self._writer.flush()

    def write(self, step: int, entries: Sequence[Entry]) -> None:
        """Writes scalars and pictures; call ``resume`` first."""
        assert self._writer is not None
        with write_errors(self._folder):
            for entry in entries:
                now = time.time()
                summaries = [scalar(*each) for each in entry.scalars.items()]
                summaries += [image(*each, dataformats="HWC") for each in entry.pictures.items()]
                for summary in summaries:
                    self._writer.write_event(Event(step=step, wall_time=now, summary=summary))
            self._writer.flush()

    def close(self, error: BaseException | None = None) -> None:
        """Closes the file; a second error is not raised, so that the first one is reported."""
        with contextlib.suppress(*([Failure] if error else [])), write_errors(self._folder):
            if self._writer:
                self._writer.close()
