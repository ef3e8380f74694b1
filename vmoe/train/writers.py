"""Files that a run writes row by row: CSV files and TensorBoard events."""

import contextlib
import csv
import io
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from tensorboardX.event_file_writer import EventsWriter
from tensorboardX.proto.event_pb2 import Event, SessionLog
from tensorboardX.summary import scalar

from vmoe.errors import Failure
from vmoe.workdir.layout import replace_text

Row = dict[str, Any]


class CsvWriter:
    """A CSV file whose first column is the step; the first row determines the other columns."""

    def __init__(self, path: Path):
        self._path = path
        self._columns: list[str] = []
        self.last_step: int | None = None

    def append(self, step: int, rows: Sequence[Row]) -> None:
        """Writes the rows of one step, all at once.

        Raises:
            Failure: the file has other columns, or cannot be written.
        """
        if not rows:
            return
        columns = ["step", *rows[0]]
        if self._columns and self._columns != columns:
            raise Failure(f"{self._path} has other columns: another version of vmoe wrote it")
        text = io.StringIO()
        writer = csv.DictWriter(text, columns)
        if not self._columns:
            writer.writeheader()
        writer.writerows({"step": step} | {k: _text(v) for k, v in r.items()} for r in rows)
        with write_errors(self._path), self._path.open("a", newline="") as file:
            file.write(text.getvalue())
        self._columns, self.last_step = columns, step

    def truncate_after(self, step: int) -> None:
        """Removes the rows after a step, and incomplete rows.

        Raises:
            Failure: the file is corrupt, or cannot be written.
        """
        rows = self._read(step) if self._path.exists() else []
        self._columns = list(rows[0]) if rows else []
        self.last_step = int(rows[-1]["step"]) if rows else None
        text = io.StringIO()
        writer = csv.DictWriter(text, self._columns)
        if rows:
            writer.writeheader()
        writer.writerows(rows)
        with write_errors(self._path):
            replace_text(self._path, text.getvalue())

    def _read(self, step: int) -> list[dict[str, str]]:
        """The complete rows up to a step."""
        try:
            with self._path.open(newline="") as file:
                reader = csv.DictReader(file)
                complete = (row for row in reader if None not in row.values() and None not in row)
                return [row for row in complete if int(row["step"]) <= step]
        except (ValueError, KeyError, csv.Error) as error:
            raise Failure(
                f"{self._path} is corrupt ({error}): repair it or move it away, then run the same "
                "command to resume"
            ) from None


class TensorBoardWriter:
    """TensorBoard events, written synchronously: tensorboardX's writer thread loses errors."""

    def __init__(self, folder: Path):
        self._folder = folder
        self._writer: EventsWriter | None = None

    def truncate_after(self, step: int) -> None:
        """Starts a new file; TensorBoard then discards the later steps of older files."""
        self.close()
        with write_errors(self._folder):
            self._folder.mkdir(exist_ok=True)
            # tensorboardX names files by the second, so the suffix makes the name unique.
            self._writer = EventsWriter(str(self._folder / "events"), f".{time.time_ns()}")
            start = SessionLog(status=SessionLog.START)
            self._writer.write_event(Event(step=step + 1, session_log=start))
            self._writer.flush()

    def write(self, step: int, values: dict[str, Any]) -> None:
        """Writes scalars of one step, by tag; call ``truncate_after`` first."""
        assert self._writer is not None
        now = time.time()
        with write_errors(self._folder):
            for tag, value in values.items():
                event = Event(step=step, wall_time=now, summary=scalar(tag, value))
                self._writer.write_event(event)
            self._writer.flush()

    def close(self) -> None:
        """Closes the file."""
        with write_errors(self._folder):
            if self._writer:
                self._writer.close()


@contextlib.contextmanager
def write_errors(path: Path) -> Iterator[None]:
    """Turns an OSError while writing a file into a Failure that names the file.

    Raises:
        Failure: the file cannot be written.
    """
    try:
        yield
    except OSError as error:
        raise Failure(
            f"{path} cannot be written ({error.strerror}); free some space and run the same "
            "command to resume from the newest checkpoint"
        ) from error


def flatten(tree: dict[str, Any], prefix: str = "") -> dict[str, float]:
    """Nested metrics as columns, named by their path: norms/gradients/head."""
    row = {}
    for name, value in tree.items():
        if isinstance(value, dict):
            row |= flatten(value, f"{prefix}{name}/")
        else:
            row[f"{prefix}{name}"] = float(value)
    return row


def _text(value: Any) -> str:
    return f"{value:.6g}" if isinstance(value, float | np.floating) else str(value)
