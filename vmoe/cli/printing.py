"""Prints tables, progress and JSON."""

import contextlib
import dataclasses
import io
import json
import math
import os
import sys
import threading
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table

from vmoe.errors import one_line

QUIET = 10.0  # seconds without a sign of progress
PIPE_WIDTH = 120  # characters per line of a table if stdout is not a terminal


def print_table(
    columns: Sequence[str], rows: Iterable[Sequence[str]], *, title: str = "", prose: bool = False
) -> None:
    """Prints a table whose first column holds names and all others numbers.

    Args:
        columns: headings; if all are empty, no header row is printed.
        prose: the other columns hold text instead, which is aligned at the left.
    """
    table = Table(show_header=any(columns))
    for i, column in enumerate(columns):
        side = "right" if i and not prose else "left"
        table.add_column(column, justify=side, overflow="fold" if prose else "ellipsis")
    for row in rows:
        table.add_row(*map(one_line, row))
    if title:
        print(title)
    terminal = sys.stdout.isatty()
    width = None if terminal or "COLUMNS" in os.environ else PIPE_WIDTH
    text = io.StringIO()  # on stdout, rich would end the process where a pipe is closed
    Console(file=text, force_terminal=terminal, markup=False, width=width).print(table)
    print(text.getvalue(), end="")


def four_digits(value: float) -> str:
    """A number with four significant digits, trailing zeros included.

    >>> four_digits(0.0141), four_digits(0.01409), four_digits(1234.0)
    ('0.01410', '0.01409', '1234')
    """
    return f"{value:#.4g}".removesuffix(".")


def print_messages(lines: Iterable[str]) -> None:
    """Prints notes about the results on stderr."""
    for line in lines:
        print(one_line(line), file=sys.stderr)


def print_json(value: Any) -> None:
    """Prints a value as one line of JSON; a number that is not finite is null."""
    print(json.dumps(_plain(value), allow_nan=False))


def _plain(value: Any) -> Any:
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        value = dataclasses.asdict(value)
    if isinstance(value, dict):
        return {name: _plain(each) for name, each in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(each) for each in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


@contextlib.contextmanager
def progress(
    what: str, steps: int | Sequence[str], *, seconds: float = QUIET
) -> Iterator[Callable[[], None]]:
    """Shows on stderr how many steps are done; yields a function that advances by one.

    On a terminal this is a bar. Elsewhere it is a line after some seconds, then after twice as
    many, and so on, so that a quick command prints none. The first step is often the slowest,
    because it compiles a program.

    Args:
        steps: the number of steps, or the name of each.
        seconds: the time to the first line.
    """
    names: Sequence[str] = () if isinstance(steps, int) else steps
    total = steps if isinstance(steps, int) else len(steps)
    now, end = 0, threading.Event()

    def text() -> str:
        doing = names[now] if now < len(names) else "compiling" if not now else ""
        return f"{what}: {doing}" if doing else what

    def report() -> None:
        wait = waited = seconds
        while not end.wait(wait):
            line = f"{text()}, {now:,} of {total:,} done after {waited:.0f} s"
            with contextlib.suppress(OSError):  # nobody reads stderr
                print(one_line(line), file=sys.stderr, flush=True)
            wait, waited = waited, 2 * waited

    console = Console(stderr=True)
    with Progress(
        TextColumn("{task.description}", markup=False),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        console=console,
        transient=True,
        redirect_stdout=False,  # it may be a file
        disable=not console.is_terminal,
    ) as bar:
        task = bar.add_task(text(), total=total)

        def advance() -> None:
            nonlocal now
            now += 1
            bar.update(task, advance=1, description=text())

        thread = None
        if not console.is_terminal:
            thread = threading.Thread(target=report, daemon=True)
            thread.start()
        try:
            yield advance
        finally:
            end.set()
            if thread:
                thread.join()
