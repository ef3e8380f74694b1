"""One run in several processes: the primary process, barriers, agreement, and errors.

Every process runs the same program and takes the same steps. What a single process knows (a
signal, a corrupt file, another run in the folder) is shared here before any process acts on it.
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

from vmoe.errors import (
    OUT_OF_MEMORY,
    Failure,
    Stopped,
    SynchronizedError,
    UsageError,
    VmoeError,
)

Result = TypeVar("Result")

HEARTBEAT_TIMEOUT = 10  # seconds without a heartbeat after which JAX ends all processes
BARRIER_TIMEOUT = 3600  # seconds that a barrier waits for a process that is alive
MESSAGE_SIZE = 1024  # bytes of a message that is sent
LOST = ("Gloo", "NCCL", "UNAVAILABLE", "DEADLINE_EXCEEDED", "CANCELLED")  # in errors of collectives

_index = 0  # of this process, for a thread that must not wait for JAX's locks


def initialize() -> None:
    """Connects this process to the others of a run.

    JAX detects SLURM, Open MPI, TPU pods, and Kubernetes if the package kubernetes is installed.
    Elsewhere set JAX_COORDINATOR_ADDRESS (host:port of the first process), JAX_NUM_PROCESSES and
    JAX_PROCESS_ID.

    Raises:
        UsageError: no cluster is detected and the variables are not set, or a process cannot
            connect.
    """
    count, index = (os.environ.get(f"JAX_{name}") for name in ("NUM_PROCESSES", "PROCESS_ID"))
    from_environment = count is not None and index is not None
    jax.config.update("jax_cpu_collectives_implementation", "gloo")
    jax.config.update("jax_enable_preemption_service", False)  # it would handle SIGTERM itself
    try:
        jax.distributed.initialize(
            num_processes=int(count) if from_environment else None,
            process_id=int(index) if from_environment else None,
            cluster_detection_method="deactivate" if from_environment else None,
            heartbeat_timeout_seconds=HEARTBEAT_TIMEOUT,
        )
    except (ValueError, RuntimeError) as error:
        raise UsageError(
            f"distributed: {' '.join(str(error).split())} Outside a cluster set "
            "JAX_COORDINATOR_ADDRESS (host:port), JAX_NUM_PROCESSES and JAX_PROCESS_ID"
        ) from None
    global _index
    _index = jax.process_index()  # waits for the other processes
    ctypes.CDLL(None).signal(signal.SIGABRT, _on_abort)


def is_primary() -> bool:
    """Whether this is the process that reports and writes shared files."""
    return jax.process_index() == 0


def is_single_process() -> bool:
    """Whether the run has one process."""
    return jax.process_count() == 1


def barrier(name: str) -> None:
    """Returns when every process has called it; each name may be used once in a run."""
    multihost.get_barrier_sync_fn()(key=name, timeout_ms=BARRIER_TIMEOUT * 1000)


def any_process(flag: bool) -> bool:
    """Whether the flag is set in any process; every process has to call it."""
    return (
        flag
        if is_single_process()
        else bool(multihost_utils.process_allgather(np.array(flag)).any())
    )


def process_allgather(array: np.ndarray) -> np.ndarray:
    """The arrays of all processes, stacked along a new first axis; exact for any dtype."""
    if is_single_process():
        return array[None]
    raw = np.ascontiguousarray(array).view(np.uint8)
    return np.ascontiguousarray(multihost_utils.process_allgather(raw)).view(array.dtype)


def first_message(message: str) -> str:
    """The first non-empty message among all processes, in their order; a collective."""
    raw = message.encode()[:MESSAGE_SIZE].ljust(MESSAGE_SIZE, b"\0")
    rows = process_allgather(np.frombuffer(raw, np.uint8))
    messages = (bytes(row).rstrip(b"\0").decode(errors="replace") for row in rows)
    return next(filter(None, messages), "")


def raise_together(work: Callable[[], Result]) -> Result:
    """Calls ``work()`` in every process; an error in one of them is raised in all.

    Raises:
        SynchronizedError: some process raised a VmoeError or an OSError. With one process its own
            error is raised.
    """
    results, message = [], ""
    try:
        results.append(work())
    except (VmoeError, OSError) as error:
        if is_single_process():
            raise
        message = f"{getattr(error, 'status', Failure.status)} {error}"
    if message := first_message(message):
        status, _, line = message.partition(" ")
        kind = UsageError if status == str(UsageError.status) else Failure
        raise SynchronizedError(kind(line))
    return results[0]


def synchronized(error: VmoeError) -> VmoeError:
    """A SynchronizedError for an error that every process raises; unchanged with one process."""
    return error if is_single_process() else SynchronizedError(error)


@contextlib.contextmanager
def abort_on_error() -> Iterator[None]:
    """Ends the process at once, with one line, on an error that other processes do not raise.

    Normal cleanup would wait for processes that are gone, or that wait for this one. The other
    processes notice that it is gone.
    """
    try:
        yield
    except BaseException as error:
        if is_single_process() or isinstance(error, SynchronizedError | Stopped):
            raise
        text = " ".join(str(error).split())
        if isinstance(error, jax.errors.JaxRuntimeError) and any(word in text for word in LOST):
            _exit(_lost_process(text[:160]))
        if "RESOURCE_EXHAUSTED" in text:
            _exit(OUT_OF_MEMORY)
        if not isinstance(error, VmoeError):
            traceback.print_exc()
        _exit(text, getattr(error, "status", Failure.status))


def _exit(line: str, status: int = Failure.status) -> None:
    """Ends this process at once, with one line."""
    os.write(2, f"vmoe: process {_index}: {line}\n".encode())
    os._exit(status)


def _lost_process(reason: str) -> str:
    return (
        f"another process is gone ({reason}); run the same command in all processes to resume from "
        "the newest checkpoint"
    )


@ctypes.CFUNCTYPE(None, ctypes.c_int)
def _on_abort(number: int) -> None:
    """Handles SIGABRT.

    JAX's runtime calls abort() in one of its threads when heartbeats are missing; handlers of
    Python's signal module do not run there.
    """
    _exit(_lost_process("JAX's runtime ended this process; its message is above"))
