"""The terminal of a run: a live line with the progress, and permanent lines above it."""

import contextlib
import sys
from collections.abc import Iterator

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Column

from vmoe.errors import one_line

SHORT = {"accuracy": "acc", "images/s": "img/s", "reporting": "report"}
"""Words of the live line, so that it fits 80 columns."""


class RunConsole:
    """Shows the progress of a run on stderr; a context manager.

    A terminal shows one live line; elsewhere each row is a plain line.
    """

    def __init__(self, steps: int) -> None:
        self._steps = steps
        # In Jupyter, rich would show each line as an output of its own; plain lines go to stderr.
        self._console = Console(
            stderr=True, markup=False, force_jupyter=False, force_terminal=sys.stderr.isatty()
        )
        self._progress = _progress(self._console, steps)
        self._task = self._progress.add_task("", total=steps)

    def __enter__(self) -> "RunConsole":
        self._progress.start()
        return self

    def __exit__(self, *exception: object) -> None:
        self._progress.stop()

    def restart(self, step: int) -> None:
        """Shows the progress of a run that continues after a step."""
        self._progress.reset(self._task, completed=step)

    def step(self, step: int) -> None:
        """Shows the number of a step."""
        self._progress.update(self._task, completed=step)

    @contextlib.contextmanager
    def activity(self, text: str) -> Iterator[None]:
        """Shows what is done inside the context, in place of the latest metrics."""
        description = self._progress.tasks[self._task].description
        self._progress.update(self._task, description=text)
        yield
        self._progress.update(self._task, description=description)

    def log(self, text: str) -> None:
        """Prints a permanent line."""
        self._console.print(one_line(text), highlight=False, soft_wrap=True)

    def show(self, step: int, *parts: str, permanent: bool = False) -> None:
        """Shows a row of a step: in the live line, or as a line of its own."""
        if not permanent:
            short = " ".join(parts)
            for word, abbreviation in SHORT.items():
                short = short.replace(word, abbreviation)
            self._progress.update(self._task, description=short)
        if permanent or not self._console.is_terminal:
            self.log(f"step {step}/{self._steps}  {'  '.join(parts)}")


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
