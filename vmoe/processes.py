"""One run in several processes: who is first, what all agree on, that nobody waits for the dead.

Every process runs the same program and takes the same turns; what one of them alone knows (a
signal, a damaged file, who else uses the folder) is agreed on here before anyone acts on it.
"""

import contextlib
import ctypes
import os
import signal
import traceback
from collections.abc import Callable, Iterator
from typing import TypeVar

import jax
import numpy as np
from jax.experimental import multihost_utils
from orbax.checkpoint import multihost

from vmoe.errors import OUT_OF_MEMORY, Failure, UsageError, VmoeError

Result = TypeVar("Result")

HEARTBEAT = 10  # seconds without a sign of life after which JAX ends all processes
PATIENCE = 3600  # seconds that a process which lives may take to come to where all meet
TEXT = 1024  # bytes of a text that is sent
LOST = ("Gloo", "NCCL", "UNAVAILABLE", "DEADLINE_EXCEEDED", "CANCELLED")  # in errors of messages

_index = 0  # of this process, for a thread that may not wait for JAX's locks


def join() -> None:
    """Makes this process one of a run's, as the cluster says or three variables do.

    SLURM, Open MPI, TPU pods, and Kubernetes with the package of that name, are recognised by JAX.
    Elsewhere each process is told by JAX_COORDINATOR_ADDRESS (host:port of the first process),
    JAX_NUM_PROCESSES and JAX_PROCESS_ID.

    Raises:
        UsageError: neither says who takes part, or the others were not met.
    """
    count, index = (os.environ.get(f"JAX_{word}") for word in ("NUM_PROCESSES", "PROCESS_ID"))
    told = count is not None and index is not None
    jax.config.update("jax_cpu_collectives_implementation", "gloo")
    jax.config.update("jax_enable_preemption_service", False)  # it would take SIGTERM from us
    try:
        jax.distributed.initialize(
            num_processes=int(count) if told else None,
            process_id=int(index) if told else None,
            cluster_detection_method="deactivate" if told else None,
            heartbeat_timeout_seconds=HEARTBEAT,
        )
    except (ValueError, RuntimeError) as error:
        raise UsageError(
            f"--distributed: {' '.join(str(error).split())} JAX_COORDINATOR_ADDRESS (host:port), "
            "JAX_NUM_PROCESSES and JAX_PROCESS_ID say who takes part, where no cluster does"
        ) from None
    global _index
    _index = jax.process_index()  # which meets the others
    ctypes.CDLL(None).signal(signal.SIGABRT, _aborted)


def _end(line: str, status: int = Failure.status) -> None:
    """Ends this process at once, with one line."""
    os.write(2, f"vmoe: process {_index}: {line}\n".encode())
    os._exit(status)


def _gone(reason: str) -> str:
    return (
        f"another process is gone ({reason}); the same line, started in all processes, goes on "
        "after the newest checkpoint"
    )


@ctypes.CFUNCTYPE(None, ctypes.c_int)
def _aborted(number: int) -> None:
    """JAX's runtime notices that heartbeats are missing and calls abort() in a thread of its own,
    in which no handler of Python's signal module would ever run."""
    _end(_gone("JAX's runtime ended this one, and says above why"))


def first() -> bool:
    """Whether this process is the one that reports and writes what is written once."""
    return jax.process_index() == 0


def alone() -> bool:
    """Whether the run is of one process."""
    return jax.process_count() == 1


def meet(place: str) -> None:
    """Returns when all processes have come here; each ``place`` once in a run."""
    multihost.get_barrier_sync_fn()(key=place, timeout_ms=PATIENCE * 1000)


def anywhere(flag: bool) -> bool:
    """Whether the flag is set in any process; returns when all have asked."""
    return flag if alone() else bool(multihost_utils.process_allgather(np.array(flag)).any())


def gathered(array: np.ndarray) -> np.ndarray:
    """The arrays of all processes, stacked along a new first axis; bit for bit, of any type."""
    if alone():
        return array[None]
    raw = np.ascontiguousarray(array).view(np.uint8)
    return np.ascontiguousarray(multihost_utils.process_allgather(raw)).view(array.dtype)


def first_text(text: str) -> str:
    """The first text that is not empty, of those of all processes in their order."""
    raw = text.encode()[:TEXT].ljust(TEXT, b"\0")
    rows = gathered(np.frombuffer(raw, np.uint8))
    texts = (bytes(row).rstrip(b"\0").decode(errors="replace") for row in rows)
    return next(filter(None, texts), "")


def together(work: Callable[[], Result]) -> Result:
    """``work()`` in every process; what it raises in one, all raise.

    Raises:
        UsageError, Failure: as some process did.
    """
    found, told = None, ""
    try:
        found = work()
    except (VmoeError, OSError) as error:
        if alone():
            raise
        told = f"{getattr(error, 'status', Failure.status)} {error}"
    if told := first_text(told):
        status, _, line = told.partition(" ")
        raise agreed((UsageError if status == str(UsageError.status) else Failure)(line))
    return found


def agreed(error: VmoeError) -> VmoeError:
    """The error, marked as one that every process raises."""
    error.agreed = True
    return error


@contextlib.contextmanager
def guarded() -> Iterator[None]:
    """In here an error that not every process has ends this one at once, with one line.

    To close files in the usual way would mean to wait for processes that are gone, or that wait
    for this one; they in turn see that it is gone.
    """
    try:
        yield
    except BaseException as error:
        if alone() or getattr(error, "agreed", False):
            raise
        text = " ".join(str(error).split())
        if isinstance(error, jax.errors.JaxRuntimeError) and any(word in text for word in LOST):
            _end(_gone(text[:160]))
        if "RESOURCE_EXHAUSTED" in text:
            _end(OUT_OF_MEMORY)
        if not isinstance(error, VmoeError):
            traceback.print_exc()
        _end(text, getattr(error, "status", Failure.status))
