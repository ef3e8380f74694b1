"""Files that a run writes row by row: CSV tables and TensorBoard events."""

import contextlib
import csv
import io
import os
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from tensorboardX.event_file_writer import EventsWriter
from tensorboardX.proto.event_pb2 import Event, SessionLog
from tensorboardX.summary import scalar

from vmoe.errors import Failure

Row = dict[str, Any]


class CsvWriter:
    """A CSV file whose first column is the step; its header is that of the first row."""

    def __init__(self, path: Path):
        self._path = path
        self._columns: list[str] = []
        self.last_step: int | None = None

    def append(self, step: int, rows: Sequence[Row]) -> None:
        """Writes rows of one step, all at once."""
        if not rows:
            return
        columns = ["step", *rows[0]]
        if self._columns and self._columns != columns:
            raise Failure(f"{self._path} has other columns: another version of vmoe made it")
        text = io.StringIO()
        writer = csv.DictWriter(text, columns)
        if not self._columns:
            writer.writeheader()
        writer.writerows({"step": step} | {k: _text(v) for k, v in r.items()} for r in rows)
        with _told(self._path), self._path.open("a", newline="") as file:
            file.write(text.getvalue())
        self._columns, self.last_step = columns, step

    def forget_after(self, step: int) -> None:
        """Keeps whole rows up to a step."""
        rows: list[dict[str, str]] = []
        if self._path.exists():
            try:
                with self._path.open(newline="") as file:
                    reader = csv.DictReader(file)
                    whole = (row for row in reader if None not in row.values() and None not in row)
                    rows = [row for row in whole if int(row["step"]) <= step]
            except (ValueError, KeyError, csv.Error) as error:
                raise Failure(
                    f"{self._path} is damaged ({error}): repair it or move it away, then the same "
                    "line goes on"
                ) from None
        self._columns = list(rows[0]) if rows else []
        self.last_step = int(rows[-1]["step"]) if rows else None
        beside = self._path.with_suffix(".tmp")
        with _told(self._path), beside.open("w", newline="") as file:
            writer = csv.DictWriter(file, self._columns)
            if rows:
                writer.writeheader()
            writer.writerows(rows)
        os.replace(beside, self._path)


class TensorBoardWriter:
    """TensorBoard's events, written at once: its own writer has a thread that fails unheard."""

    def __init__(self, folder: Path):
        self._folder = folder
        self._writer: EventsWriter | None = None

    def forget_after(self, step: int) -> None:
        """A new file, at which TensorBoard forgets what others hold of later steps."""
        self.close()
        with _told(self._folder):
            self._folder.mkdir(exist_ok=True)
            # Its own names have whole seconds: a second file of one second would replace it.
            self._writer = EventsWriter(str(self._folder / "events"), f".{time.time_ns()}")
            start = SessionLog(status=SessionLog.START)
            self._writer.write_event(Event(step=step + 1, session_log=start))
            self._writer.flush()

    def write(self, step: int, values: dict[str, Any]) -> None:
        """Scalars of one step, by tag."""
        now = time.time()
        with _told(self._folder):
            for tag, value in values.items():
                event = Event(step=step, wall_time=now, summary=scalar(tag, value))
                self._writer.write_event(event)
            self._writer.flush()

    def close(self) -> None:
        """What is written is written; the next write needs ``forget_after`` first."""
        with _told(self._folder):
            if self._writer:
                self._writer.close()


@contextlib.contextmanager
def _told(path: Path) -> Iterator[None]:
    """What the system says against writing, as one line that names the place."""
    try:
        yield
    except OSError as error:
        raise Failure(
            f"{path} cannot be written ({error.strerror}); make room, then the same line goes on "
            "from its newest checkpoint"
        ) from error


def _flat(tree: dict[str, Any], prefix: str = "") -> dict[str, float]:
    """Nested measures as columns, named by their path: norms/gradients/head."""
    row = {}
    for name, value in tree.items():
        if isinstance(value, dict):
            row |= _flat(value, f"{prefix}{name}/")
        else:
            row[f"{prefix}{name}"] = float(value)
    return row


def _text(value: Any) -> str:
    return f"{value:.6g}" if isinstance(value, float | np.floating) else str(value)
