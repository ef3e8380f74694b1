"""Progress on stderr: how much of some work is done, while it lasts, and how long it took."""

import contextlib
import datetime
import math
import sys
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import TypeVar

from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)

from vmoe.errors import one_line

T = TypeVar("T")
QUIET = 10.0  # seconds without a sign of progress


@contextlib.contextmanager
def progress(
    what: str,
    steps: int | Sequence[str] | None,
    *,
    first: str = "compiling",
    seconds: float = QUIET,
) -> Iterator[Callable[[], None]]:
    """Shows on stderr how many steps are done; yields a function that advances by one.

    On a terminal this is a bar. Elsewhere it is a line after some seconds, then after twice as
    many, and so on, and a last one with the time that it took; quick work prints no line. Both have
    the time left, at the pace since the first step, which may have compiled.

    Args:
        steps: the number of steps, or the name of each; None if it is not known.
        first: what is done until the first step is done, as it is often the slowest.
        seconds: the time to the first line.
    """
    names: Sequence[str] = () if steps is None or isinstance(steps, int) else steps
    total = steps if steps is None or isinstance(steps, int) else len(steps)
    now, end, start = 0, threading.Event(), time.monotonic()
    paced = start  # the end of the first step

    def text() -> str:
        doing = names[now] if now < len(names) else first if not now else ""
        return f"{what}: {doing}" if doing else what

    def show(done: str, rest: str = "") -> None:
        line = f"{done} after {time.monotonic() - start:.0f} s{rest}"
        with contextlib.suppress(OSError):  # nobody reads stderr
            print(one_line(line), file=sys.stderr, flush=True)

    def report() -> None:
        wait = waited = seconds
        while not end.wait(wait):
            count = "" if total is None else f", {now:,} of {total:,} done"
            show(text() + count, left(now - 1, (total or 0) - 1, time.monotonic() - paced))
            wait, waited = waited, 2 * waited

    console = Console(stderr=True)
    counted = [MofNCompleteColumn(), TimeRemainingColumn(), TextColumn("left")]
    with Progress(
        TextColumn("{task.description}", markup=False),
        BarColumn(),
        *(counted if total is not None else [TimeElapsedColumn()]),
        console=console,
        speed_estimate_period=math.inf,  # a step may take minutes
        transient=True,
        redirect_stdout=False,  # it may be a file
        disable=not console.is_terminal,
    ) as bar:
        task = bar.add_task(text(), total=total)

        def advance() -> None:
            nonlocal now, paced
            now += 1
            paced = time.monotonic() if now == 1 else paced
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
    if thread and time.monotonic() - start > seconds:
        show(f"{what}: done")


def left(done: int, total: int, seconds: float) -> str:
    """The time left at the pace so far, as the end of a line; empty if it is not known.

    >>> left(2, 8, 60.0), left(0, 8, 60.0)
    (', 0:03:00 left', '')
    """
    if not 0 < done < total:
        return ""
    return f", {datetime.timedelta(seconds=round((total - done) * seconds / done))} left"


def tracked(items: Iterable[T], what: str, total: int) -> Iterator[T]:
    """Yields the items, and shows how many are done."""
    with progress(what, total, first="") as advance:
        for item in items:
            yield item
            advance()
