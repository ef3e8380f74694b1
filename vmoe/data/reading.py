"""Reads batches ahead of their use, and reports long waits.

A reader returns batches in order. Each of its threads reads one batch at a time, itself or through
a worker process (``vmoe/data/workers.py``). ``on_wait`` is called while a batch is awaited: it
shows that a source or a worker hangs, and can end the wait. Threads do not keep the process alive.
"""

import dataclasses
import sys
import threading
import time
from collections import deque
from collections.abc import Callable, Sequence
from concurrent.futures import Future, wait
from queue import SimpleQueue
from typing import Any, Generic

from vmoe.data.workers import IN_THREADS, Batches, T_co, Workers, keep_freed_memory

AHEAD = 2  # batches that may be ready, in addition to one for each thread
TICK = 1.0  # seconds between calls of on_wait
SHOWN_AFTER, SHOWN_EVERY = 10, 30  # seconds until the first message, and between messages

OnWait = Callable[[int], None]
"""Called every second while a batch is awaited, with the seconds so far; an exception ends the
wait."""


def wait_message(seconds: int) -> str:
    """The message that is due after some seconds of a wait; empty if none is.

    >>> wait_message(60), wait_message(61)
    ('waiting for data for 60 s', '')
    """
    due = seconds == SHOWN_AFTER or seconds % SHOWN_EVERY == 0
    return f"waiting for data for {seconds} s" if due else ""


def print_wait(seconds: int) -> None:
    """Prints the messages about a wait."""
    if message := wait_message(seconds):
        print(message, file=sys.stderr, flush=True)


@dataclasses.dataclass(frozen=True)
class Reading:
    """How a pass over images reads them, and who watches it."""

    batch_size: int = 256
    """Images per batch, over all devices; passes round up to a multiple of the devices."""
    workers: Workers = IN_THREADS
    """Processes that read the images."""
    on_batch: Callable[[], None] = lambda: None
    """Called when a batch has been read; an exception that it raises ends the pass."""
    on_unreadable: Callable[[str], None] | None = None
    """Called with the reason for each image that is left out because it cannot be read; if None,
    the reason is raised."""
    on_wait: OnWait = print_wait
    """Called while a batch is awaited."""


READING = Reading()


class Reader(Generic[T_co]):
    """An iterator over batches that are read ahead; close it after use. See ``read_ahead``."""

    def __init__(self, readers: Sequence[Callable[[int], T_co]], numbers: range, on_wait: OnWait):
        self._numbers, self._on_wait = iter(numbers), on_wait
        self._tasks: SimpleQueue[tuple[Future[T_co], int] | None] = SimpleQueue()
        self._pending: deque[Future[T_co]] = deque()
        self._threads = [
            threading.Thread(target=_run, args=(read, self._tasks), name="reader", daemon=True)
            for read in readers[: len(numbers)]
        ]
        for thread in self._threads:
            thread.start()
        for _ in range(len(self._threads) + AHEAD):
            self._submit()

    def _submit(self) -> None:
        for number in self._numbers:
            self._pending.append(Future())
            self._tasks.put((self._pending[-1], number))
            return

    def __iter__(self) -> "Reader[T_co]":
        return self

    def __next__(self) -> T_co:
        if not self._pending:
            raise StopIteration
        seconds = 0
        while not wait([self._pending[0]], TICK).done:
            seconds += 1
            self._on_wait(seconds)
        self._submit()
        return self._pending.popleft().result()

    def close(self) -> None:
        """Ends the threads, each after the batch that it is reading."""
        for future in self._pending:
            future.cancel()
        for _ in self._threads:
            self._tasks.put(None)
        deadline = time.monotonic() + TICK
        for thread in self._threads:  # the interpreter must not end while they compute
            thread.join(max(0, deadline - time.monotonic()))

    def __enter__(self) -> "Reader[T_co]":
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()


def read_ahead(
    batches: Batches[T_co],
    start: int,
    count: int,
    workers: Workers = IN_THREADS,
    *,
    on_wait: OnWait = print_wait,
) -> Reader[T_co]:
    """Reads consecutive batches ahead of their use.

    Returns:
        an iterator over the batches; raises the errors of reading them, or WorkerDied.
    """
    keep_freed_memory()
    return Reader(workers.readers(batches) if count else [], range(start, start + count), on_wait)


def _run(read: Callable[[int], Any], tasks: "SimpleQueue[tuple[Future[Any], int] | None]") -> None:
    """Reads the batches whose numbers are in a queue."""
    for future, number in iter(tasks.get, None):
        if future.set_running_or_notify_cancel():
            try:
                future.set_result(read(number))
            except BaseException as error:
                future.set_exception(error)
