"""Processes that read batches, or parts of batches, for this one.

    number -> pipe -> batches[number] or batches.part(number) -> shared memory -> a copy

Grain's own workers are not used: if one of them dies or hangs, Grain polls for ever, and they can
outlive the process that started them.
"""

import contextlib
import ctypes
import functools
import multiprocessing
import os
import pickle
import shutil
import signal
import sys
import threading
import traceback
from collections.abc import Callable, Iterator, Sequence
from multiprocessing import resource_tracker, util
from multiprocessing.connection import Connection
from multiprocessing.shared_memory import SharedMemory
from types import ModuleType
from typing import Any, Protocol, TypeVar, runtime_checkable

import cloudpickle
import numpy as np
from jaxtyping import UInt8

from vmoe.data.sources import Source
from vmoe.errors import Failure, UsageError
from vmoe.fields import at_least
from vmoe.host.cores import usable_cores
from vmoe.host.signals import SIGNALS

THREADS = 2  # that read batches if there are no workers, unless images are tiny
TINY = 16 << 10  # bytes of an image in memory and as it is prepared, together
MOST_WORKERS = 32  # unless more are asked for; each takes some 300 MB of memory
WORTH_WORKERS = 1_000  # images; fewer are read before workers have started
FEWER = {"num_workers": None, "data.num_workers": None, "batch_size": None}  # remedies
FIRST = 8  # images, of which one tells whether all are encoded, and how large they are
EXIT_TIMEOUT = 5.0  # seconds for a process to end after it has closed its pipe
SHARED_MEMORY = "/dev/shm"  # the folder of shared memory on Linux

M_TRIM_THRESHOLD, M_MMAP_THRESHOLD = -1, -3  # settings of mallopt in glibc
KEPT = 1 << 30  # bytes of freed memory
MOST = 1 << 25  # bytes; the largest M_MMAP_THRESHOLD that older versions accept

T_co = TypeVar("T_co", covariant=True)

_starting = threading.Lock()  # held while this process is changed for new ones


@runtime_checkable
class Batches(Protocol[T_co]):
    """Batches by number; they must be picklable if there are workers."""

    def __getitem__(self, number: int) -> T_co:
        """Reads a batch; called from several threads."""


@runtime_checkable
class InParts(Batches[T_co], Protocol[T_co]):
    """Batches that are read in parts, so that many readers share the first one.

    Attributes:
        parts: the number of parts of each batch.
    """

    parts: int

    def part(self, number: int) -> T_co:
        """Reads part ``number % parts`` of batch ``number // parts``."""

    def joined(self, parts: list[Any]) -> T_co:
        """The batch of all its parts; empties the list, to free their memory one by one."""


class WorkerDied(Failure):
    """A worker ended by itself, or was killed."""


class Workers:
    """Processes that read batches for this one; threads if there are none. Close it after use.

    The workers ignore SIGINT, SIGTERM and SIGHUP, do not use the accelerator, and end with this
    process, however it ends. They do not run its script, so what that sets in libraries, such as
    Pillow's ``LOAD_TRUNCATED_IMAGES``, does not hold in them.
    """

    def __init__(self, count: int = 0, threads: int = THREADS):
        """Starts ``count`` processes; with 0, so many threads are used."""
        self._threads = threads
        with _inherited() if count else contextlib.nullcontext():
            self._workers = [_Worker(f"data worker {i + 1} of {count}") for i in range(count)]
        self._closing = util.Finalize(self, _kill, (self._workers,), exitpriority=1)

    def readers(self, batches: Batches[T_co]) -> list[Callable[[int], T_co]]:
        """One function for each thread of a reader; it reads a batch, or a part, by its number."""
        if not self._workers:
            return [reader_of(batches)] * self._threads
        pickled = cloudpickle.dumps(batches)  # Grain keeps lambdas
        return [worker.opened(pickled) for worker in self._workers]

    def __str__(self) -> str:
        """What reads, as shown to users."""
        count, what = len(self._workers) or self._threads, "worker" if self._workers else "thread"
        return f"{count} {what}{'s' * (count > 1)}"

    def close(self) -> None:
        """Ends the processes, also while they read."""
        self._closing()

    def __enter__(self) -> "Workers":
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()


def reader_of(batches: Batches[T_co]) -> Callable[[int], T_co]:
    """Reads a batch by its number, or a part of one if they have parts."""
    return batches.part if isinstance(batches, InParts) else batches.__getitem__


def count_workers(
    asked: int | None,
    source: Source,
    images: int,
    part_bytes: int,
    *,
    share: tuple[int, int] | None = None,
) -> int:
    """The number of workers that read a source.

    Args:
        asked: the number; if None, one fewer than the cores of each process, and at most
            ``MOST_WORKERS``. Threads then read where they are as fast: few images, pixels that need
            no decoding, one or two cores; and in a process that may start no others, such as one of
            a pool.
        images: the number of images to read.
        part_bytes: of the largest part of a batch.
        share: the processes on this host, each with workers of its own, and the cores of each; if
            None, this process has all.

    Raises:
        UsageError: the number is negative, or the shared memory is too small for so many.
    """
    at_least(0).check(num_workers=asked or 0)
    processes, cores = share or (1, usable_cores())
    # A worker that meets a larger part gets new memory while the old one is still there.
    each = 2 * part_bytes * processes
    free = shutil.disk_usage(SHARED_MEMORY).free if os.path.isdir(SHARED_MEMORY) else sys.maxsize
    if asked is None:
        count = min(cores - 1, MOST_WORKERS, free // each)
        may = images >= WORTH_WORKERS and not multiprocessing.current_process().daemon
        worth = count > 1 and may and not isinstance(_first_image(source), np.ndarray)
        return count if worth else 0
    if free < asked * each:
        among = f" in each of {processes} processes" if processes > 1 else ""
        raise UsageError(
            f"they need {_mb(asked * each)} of shared memory, twice {_mb(part_bytes)} of images "
            f"each{among}, and {SHARED_MEMORY} has {_mb(free)} free: enlarge it (shm-size in "
            "Docker), or use fewer workers or smaller batches",
            num_workers=asked,
        ).remedied_by(**FEWER)
    return asked


def num_threads(source: Source, image_bytes: int) -> int:
    """The number of threads that read a source fastest, if there are no workers.

    One for tiny images in memory: all of the work holds Python's lock, which two would only pass to
    each other. Two wait for files at the same time, and decode outside the lock.

    Args:
        image_bytes: of a prepared image.
    """
    image = _first_image(source)
    return 1 if isinstance(image, np.ndarray) and image.nbytes + image_bytes <= TINY else THREADS


def _first_image(source: Source) -> bytes | UInt8[np.ndarray, "h w 3"] | None:
    """The first image that can be read; None if the first ones cannot."""
    for i in range(min(len(source), FIRST)):
        with contextlib.suppress(UsageError):
            return source[i].image
    return None


def _mb(size: int) -> str:
    return f"{size / 2**20:,.1f} MiB"


@contextlib.contextmanager
def _inherited() -> Iterator[None]:
    """Blocks the signals that stop a run, sets JAX to the CPU, and hides the script.

    New processes inherit all three.
    """
    blocked = signal.pthread_sigmask(signal.SIG_BLOCK, SIGNALS)
    resource_tracker.ensure_running()
    signal.pthread_sigmask(signal.SIG_BLOCK, SIGNALS)  # the tracker has unblocked some
    with _starting:
        platforms = os.environ.get("JAX_PLATFORMS")
        os.environ["JAX_PLATFORMS"] = "cpu"  # Grain imports JAX
        # A new process would run the user's script, which may lack `if __name__ == "__main__"`.
        script, sys.modules["__main__"] = sys.modules["__main__"], ModuleType("__main__")
        try:
            yield
        finally:
            sys.modules["__main__"] = script
            del os.environ["JAX_PLATFORMS"]
            if platforms is not None:
                os.environ["JAX_PLATFORMS"] = platforms
            signal.pthread_sigmask(signal.SIG_SETMASK, blocked)


class _Worker:
    """A process that reads one batch or part at a time, and the memory that it shares with us."""

    def __init__(self, name: str):
        context = multiprocessing.get_context("spawn")
        self._connection, connection = context.Pipe()
        self._process = context.Process(target=_serve, args=(connection,), name=name, daemon=True)
        self._process.start()
        connection.close()  # so that reading from a process that is gone fails
        self._lock = threading.Lock()
        self._opened: list[bytes] = []
        self._memory: SharedMemory | None = None

    def opened(self, pickled: bytes) -> Callable[[int], Any]:
        """A function that reads one of the pickled batches, or a part, by its number."""

        def read(number: int) -> Any:
            with self._lock:
                try:
                    result = self._ask(pickled, number)
                except (EOFError, ConnectionError):
                    raise WorkerDied(self._obituary()).remedied_by(**FEWER) from None
                if isinstance(result, BaseException):
                    raise result
                return self._unpacked(*result)

        return read

    def _ask(self, pickled: bytes, number: int) -> Any:
        new = pickled not in self._opened
        if new:
            self._opened.append(pickled)
        message = (self._opened.index(pickled), pickled if new else None, number)
        # Not send(): the error of a broken pipe would keep a view of its buffer, and Python 3.13
        # prints a BufferError when it deletes both.
        self._connection.send_bytes(pickle.dumps(message))
        return self._connection.recv()

    def _unpacked(self, memory_name: str, sizes: Sequence[int], pickled: bytes) -> Any:
        """A copy of what the process has written to the shared memory."""
        if memory_name:
            self._attach(memory_name)
        whole = np.frombuffer(_bytes(self._memory), np.uint8, sum(sizes)).copy()
        return pickle.loads(pickled, buffers=np.split(whole, np.cumsum(sizes)[:-1]))

    def _attach(self, name: str) -> None:
        if self._memory:
            self._memory.close()
        self._memory = SharedMemory(name)
        self._memory.unlink()  # it stays until both processes close it, or end

    def _obituary(self) -> str:
        self._process.join(EXIT_TIMEOUT)
        status = self._process.exitcode
        if status is None or status >= 0:
            return f"{self._process.name} ended with status {status}; its error is above"
        name = signal.Signals(-status).name
        fewer = "use fewer workers or smaller batches"
        perhaps = {
            "SIGKILL": f", perhaps because the machine is out of memory: {fewer}",
            "SIGBUS": ", perhaps because shared memory is full: enlarge it (shm-size in Docker), "
            f"or {fewer}",
        }
        return f"{self._process.name} was killed by {name}{perhaps.get(name, '')}"

    def kill(self) -> None:
        self._process.kill()
        self._process.join(EXIT_TIMEOUT)  # a disk that hangs keeps it from ending


def _kill(workers: Sequence[_Worker]) -> None:
    for worker in workers:
        worker.kill()


def _serve(connection: Connection) -> None:
    """Reads what the parent process requests; ends with that process."""
    keep_freed_memory()
    threading.Thread(target=_end_with_parent, daemon=True).start()
    opened: dict[int, Batches[Any]] = {}
    shared = _Shared()
    with contextlib.suppress(EOFError, ConnectionError):  # the other process is gone
        while True:
            key, pickled, number = connection.recv()
            try:
                if pickled:
                    opened[key] = pickle.loads(pickled)
                result = shared.put(reader_of(opened[key])(number))
            except Exception as error:
                error.add_note(f"in a data worker:\n{traceback.format_exc()}")
                result = error
            connection.send(result)


def _end_with_parent() -> None:
    parent = multiprocessing.parent_process()
    if parent is not None:
        parent.join()
    os._exit(0)


class _Shared:
    """A worker's shared memory; it is as large as the largest batch or part so far."""

    def __init__(self) -> None:
        self._memory: SharedMemory | None = None

    def put(self, read: Any) -> tuple[str, list[int], bytes]:
        """Writes the arrays of a batch, one after the other.

        Returns:
            the name of the memory if it is new; the sizes of the arrays in bytes; the rest of the
            batch, pickled.
        """
        buffers: list[pickle.PickleBuffer] = []
        pickled = pickle.dumps(read, protocol=5, buffer_callback=buffers.append)
        parts = [buffer.raw() for buffer in buffers]
        sizes = [part.nbytes for part in parts]
        name = self._grow(sum(sizes))
        start, shared = 0, _bytes(self._memory)
        for part in parts:
            shared[start : start + part.nbytes] = part
            start += part.nbytes
        return name, sizes, pickled

    def _grow(self, size: int) -> str:
        """Makes room for a batch; returns the name of the memory if it is new, else ""."""
        if self._memory and self._memory.size >= size:
            return ""
        if self._memory:
            self._memory.close()
        self._memory = SharedMemory(create=True, size=max(size, 1))
        return self._memory.name


@functools.cache
def keep_freed_memory() -> None:
    """Keeps freed memory in this process (glibc's mallopt): up to 1 GiB at the end of its heap.

    Freed memory between arrays that are still in use is kept, too, whatever its size. By default
    glibc returns large arrays to the kernel when they are freed. The page faults of the next arrays
    then take a tenth of the time of reading images, and up to a third of a training step of a small
    model on a CPU. Does nothing on systems other than Linux.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None) if sys.platform == "linux" else None
    if mallopt:
        mallopt(M_TRIM_THRESHOLD, KEPT)
        if not mallopt(M_MMAP_THRESHOLD, KEPT):
            mallopt(M_MMAP_THRESHOLD, MOST)


def _bytes(memory: SharedMemory | None) -> memoryview:
    assert memory is not None and memory.buf is not None  # not closed
    return memory.buf


IN_THREADS = Workers()
"""Threads instead of processes."""
