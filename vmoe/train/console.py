"""The terminal of a run: a live line with the progress, and permanent lines above it."""

import contextlib
import datetime
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import TextIO, cast

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Column

from vmoe.errors import one_line
from vmoe.host.progress import left
from vmoe.host.streams import LossyStream
from vmoe.train.sinks import Entry, Sink
from vmoe.workdir.layout import CONSOLE, append_bytes

SHORT = {"accuracy": "acc", "images/s": "img/s", "reporting": "report"}
"""Abbreviations in the live line, so that it fits 80 columns."""


class RunConsole(Sink):
    """Shows the progress of a run on stderr.

    A terminal shows one live line; elsewhere each row is a plain line with the time of day, the
    epoch, the share done and the time left, and what the run does other than steps is a line when
    it begins and when it ends. If stderr cannot be written, messages are dropped, and console.txt
    in the run folder records this.

    Args:
        steps: number of steps of the run.
        epoch: the part of an epoch that a step takes; None if it is not known.
    """

    def __init__(self, steps: int, workdir: Path, epoch: float | None = None) -> None:
        self._steps, self._epoch = steps, epoch
        self._first: tuple[int, float] | None = None  # the first step of this process, and its time
        self._activity: tuple[str, float] | None = None  # and when it began
        self._stderr = LossyStream(sys.stderr)
        self._record: Path | None = workdir / CONSOLE  # None once written
        # In Jupyter, rich would show each line as an output of its own; plain lines go to stderr.
        self._console = Console(
            file=cast(TextIO, self._stderr),
            markup=False,
            force_jupyter=False,
            force_terminal=self._stderr.isatty(),
        )
        self._progress = _progress(self._console, steps)
        self._task = self._progress.add_task("", total=steps)
        self._latest = ""  # metrics in the live line
        self._open = contextlib.ExitStack()

    def __enter__(self) -> "RunConsole":
        self._open.enter_context(contextlib.redirect_stderr(self._console.file))
        self._open.enter_context(self._progress)
        return self

    def close(self, error: BaseException | None) -> None:
        """Ends the live line."""
        self._open.close()
        self._record_loss()

    def resume(self, step: int) -> None:
        """Shows the progress of a run that continues after a step."""
        self._first = None
        self._progress.reset(self._task, completed=step)

    def step(self, step: int) -> None:
        """Shows the number of a step."""
        self._first = self._first or (step, time.monotonic())
        self._progress.update(self._task, completed=step)
        self._record_loss()

    def activity(self, text: str) -> None:
        """Shows a text instead of the latest metrics; if it is empty, shows the metrics again."""
        self._progress.update(self._task, description=text or self._latest)
        if self._console.is_terminal:
            return
        now = time.monotonic()
        if self._activity:
            self.log(f"{self._activity[0]}: {now - self._activity[1]:.1f} s")
        self._activity = (text, now) if text else None
        if text:
            self.log(text)

    def log(self, text: str) -> None:
        """Prints a permanent line."""
        when = "" if self._console.is_terminal else f"{datetime.datetime.now():%Y-%m-%d %H:%M:%S} "
        self._console.print(when + one_line(text), highlight=False, soft_wrap=True)
        self._record_loss()

    def write(self, step: int, entries: Sequence[Entry]) -> None:
        """Shows the texts of each entry: in the live line, or as a line of its own."""
        for entry in entries:
            if entry.passing:
                self._latest = " ".join(entry.texts)
                for word, abbreviation in SHORT.items():
                    self._latest = self._latest.replace(word, abbreviation)
                self._progress.update(self._task, description=self._latest)
            if entry.texts and not (entry.passing and self._console.is_terminal):
                self.log("  ".join([self._place(step), *entry.texts]))

    def _place(self, step: int) -> str:
        """The number of a step; outside a terminal, which shows these, what is done and left."""
        place = f"step {step}/{self._steps}"
        if self._console.is_terminal:
            return place
        epoch = "" if self._epoch is None else f", epoch {step * self._epoch:.2f}"
        first, start = self._first or (step, 0.0)
        seconds = time.monotonic() - start
        return f"{place}, {step / self._steps:.0%}{epoch}" + left(
            step - first, self._steps - first, seconds
        )

    def _record_loss(self) -> None:
        """Records, once, that stderr cannot be written."""
        if self._stderr.lost and self._record:
            now = datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")
            line = f"{now} stderr cannot be written ({self._stderr.lost}): messages are dropped\n"
            with contextlib.suppress(OSError):  # the disk may be full, too; tried again
                append_bytes(self._record, line.encode())
                self._record = None


def _progress(console: Console, steps: int) -> Progress:
    """The live line: step, time left and the latest metrics; a bar if there is room."""
    return Progress(
        MofNCompleteColumn(table_column=Column(min_width=2 * len(str(steps)) + 1)),
        *([BarColumn(bar_width=20)] if console.width >= 120 else []),
        TimeRemainingColumn(compact=True, table_column=Column(min_width=len("00:00"))),
        TextColumn("left", table_column=Column(min_width=len("left"))),
        TextColumn(
            "{task.description}",
            markup=False,
            table_column=Column(ratio=1, no_wrap=True, overflow="ellipsis"),
        ),
        console=console,
        expand=True,
        disable=not console.is_terminal,
    )
