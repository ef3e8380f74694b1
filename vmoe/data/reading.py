"""Reads batches ahead of their use, and reports long waits.

A reader returns batches in order. Each of its threads reads one part of a batch at a time, itself
or through a worker process (``vmoe/data/workers.py``). ``on_wait`` is called while a batch is
awaited: it shows that a source or a worker hangs, and can end the wait. Threads do not keep the
process alive.
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

from vmoe.data.workers import (
    IN_THREADS,
    Batches,
    InParts,
    T_co,
    Workers,
    keep_freed_memory,
)

AHEAD = 2  # batches that may be ready, in addition to those that the threads read
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
    """Called for each batch: once it is computed in ``passes.measure``, and once it is read
    elsewhere. An exception that it raises ends the pass."""
    on_unreadable: Callable[[str], None] | None = None
    """Called with the reason for each image that is left out because it cannot be read; if None,
    the reason is raised."""
    on_wait: OnWait = print_wait
    """Called while a batch is awaited."""


READING = Reading()


class Reader(Generic[T_co]):
    """An iterator over batches that are read ahead; close it after use. See ``read_ahead``."""

    def __init__(
        self,
        batches: Batches[T_co],
        readers: Sequence[Callable[[int], T_co]],
        numbers: range,
        on_wait: OnWait,
    ):
        self._numbers, self._on_wait = iter(numbers), on_wait
        self._batches, self._parts = batches, _parts_of(batches)
        self._tasks: SimpleQueue[tuple[_Assembly[T_co], int] | None] = SimpleQueue()
        self._pending: deque[Future[T_co]] = deque()
        self._threads = [
            threading.Thread(target=_run, args=(read, self._tasks), name="reader", daemon=True)
            for read in readers[: len(numbers) * self._parts]
        ]
        for thread in self._threads:
            thread.start()
        for _ in range(-(-len(self._threads) // self._parts) + AHEAD):
            self._submit()

    def _submit(self) -> None:
        for number in self._numbers:
            assembly = _Assembly(self._batches, number * self._parts)
            self._pending.append(assembly.future)
            for part in range(self._parts):
                self._tasks.put((assembly, part))
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
        """Ends the threads, each after the part that it is reading."""
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
    readers = workers.readers(batches) if count else []
    return Reader(batches, readers, range(start, start + count), on_wait)


def _parts_of(batches: Batches[Any]) -> int:
    return batches.parts if isinstance(batches, InParts) else 1


class _Assembly(Generic[T_co]):
    """A batch whose parts are read by several threads.

    Attributes:
        future: the batch, or the error of its first part that could not be read.
    """

    def __init__(self, batches: Batches[T_co], first: int):
        """``first``: the number of the first part."""
        self.future: Future[T_co] = Future()
        self._batches, self._first = batches, first
        self._parts: list[Any] = [None] * _parts_of(batches)
        self._errors: dict[int, BaseException] = {}
        self._left, self._lock = len(self._parts), threading.Lock()

    def read(self, part: int, read: Callable[[int], T_co]) -> None:
        """Reads a part; the thread that reads the last one joins all, unless the reader closed."""
        if self.future.cancelled():
            return
        try:
            self._parts[part] = read(self._first + part)
        except BaseException as error:
            self._errors[part] = error
        with self._lock:
            self._left -= 1
            if self._left:
                return
        if not self.future.set_running_or_notify_cancel():
            return
        try:
            if self._errors:
                raise self._errors[min(self._errors)]
            batches, parts = self._batches, self._parts
            self.future.set_result(
                batches.joined(parts) if isinstance(batches, InParts) else parts.pop()
            )
        except BaseException as error:
            self.future.set_exception(error)


def _run(
    read: Callable[[int], Any], tasks: "SimpleQueue[tuple[_Assembly[Any], int] | None]"
) -> None:
    """Reads the parts whose numbers are in a queue."""
    for assembly, part in iter(tasks.get, None):
        assembly.read(part, read)
