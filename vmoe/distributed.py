"""One run in several processes: the primary process, barriers, agreement, and errors.

Every process runs the same program and takes the same steps. Setup checks once that all have the
same config, data and versions. An event that one process sees (a signal, a corrupt file, another
run in the folder) is shared here before any process acts on it.
"""

import contextlib
import ctypes
import itertools
import json
import os
import platform
import signal
import traceback
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from typing import Any, TypeVar

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
    is_out_of_memory,
)
from vmoe.host import signals
from vmoe.host.cores import core_numbers, cores, quota

Result = TypeVar("Result")

# Seconds without a heartbeat after which JAX ends all processes. A paused container or a virtual
# machine that moves to another host sends none for a minute or more.
HEARTBEAT_TIMEOUT = 100
BARRIER_TIMEOUT = 3600  # seconds that a barrier waits for a process that is alive
LOST = ("Gloo", "NCCL", "UNAVAILABLE", "DEADLINE_EXCEEDED", "CANCELLED")  # in errors of collectives

_index = 0  # this process's index, for a thread that must not wait for JAX's locks
_numbers = itertools.count()  # for names of barriers


def initialize() -> None:
    """Connects this process to the others of a run.

    JAX detects SLURM, Open MPI, TPU pods, and Kubernetes if the package kubernetes is installed.
    Elsewhere set JAX_COORDINATOR_ADDRESS (host:port of the first process), JAX_NUM_PROCESSES and
    JAX_PROCESS_ID.

    Raises:
        UsageError: no cluster is detected and the variables are not set, a process cannot
            connect, or the processes have different numbers of devices.
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
    counts = Counter(device.process_index for device in jax.devices())
    if len(set(counts.values())) > 1:
        raise UsageError(
            f"distributed: the processes have {list(counts.values())} devices: give each the same "
            "number"
        )


def check_devices() -> None:
    """Starts JAX on its devices, unless it has started.

    Raises:
        UsageError: ``JAX_PLATFORMS`` names devices that are not there.
    """
    try:
        jax.devices()
    except (RuntimeError, AssertionError) as error:  # AssertionError if the plugin is missing
        platforms = os.environ.get("JAX_PLATFORMS")
        if not platforms:
            raise
        reason = " ".join(str(error).partition(" (set JAX_PLATFORMS")[0].split())
        raise UsageError(
            f"JAX finds no such device{f' ({reason})' if reason else ''}; unset it or use cpu; a "
            "GPU or TPU needs the extra cuda or tpu",
            JAX_PLATFORMS=platforms,
        ) from None


def is_primary() -> bool:
    """Whether this is the process that reports and writes shared files."""
    return jax.process_index() == 0


def is_single_process() -> bool:
    """Whether the run has one process."""
    return jax.process_count() == 1


def barrier() -> None:
    """Returns when every process has called it; a collective would time out on the slowest one."""
    if not is_single_process():
        key = f"barrier {next(_numbers)}"
        multihost.get_barrier_sync_fn()(key=key, timeout_ms=BARRIER_TIMEOUT * 1000)


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


def gather(text: str) -> list[str]:
    """The texts of all processes, in their order; a collective."""
    raw = np.frombuffer(text.encode(errors="backslashreplace"), np.uint8)
    longest = int(process_allgather(np.array(len(raw))).max())
    if not longest:
        return [""] * jax.process_count()
    rows = process_allgather(np.pad(raw, (0, longest - len(raw))))
    return [bytes(row).rstrip(b"\0").decode() for row in rows]


def share_of_host() -> tuple[int, int]:
    """The number of processes on this host, and that of cores for each of them; a collective.

    Processes that may run on the same cores have equal parts of them.
    """
    node = platform.node()
    found = [json.loads(each) for each in gather(json.dumps([node, core_numbers()]))]
    here = [numbers for name, numbers in found if name == node]
    together = min(len(set().union(*here)), quota())
    return len(here), max(1, min(cores(), int(together / len(here))))


def first_message(message: str) -> str:
    """The first non-empty message among all processes, in their order; a collective."""
    return next(filter(None, gather(message)), "")


def check_same(facts: Mapping[str, Any]) -> None:
    """Checks that all processes have the same facts; a collective.

    Args:
        facts: JSON values by name. Lists and dicts are compared value by value.

    Raises:
        SynchronizedError: they differ; the message has the first process that differs from the
            primary one, and the first fact that differs.
    """
    first, *others = (dict(_flat(json.loads(text))) for text in gather(json.dumps(facts)))
    for i, other in enumerate(others, start=1):
        for name in [*first, *other]:
            if first.get(name) != other.get(name):
                raise synchronized(
                    UsageError(
                        f"process {i} has {name}={other.get(name)}, process 0 has "
                        f"{name}={first.get(name)}: give all processes the same command, data and "
                        "versions"
                    )
                )


def _flat(value: Any, place: str = "") -> Iterator[tuple[str, Any]]:
    """The values in nested lists and dicts, each with its path.

    >>> list(_flat({"a": [1, {"b": 2}]}))
    [('a.0', 1), ('a.1.b', 2)]
    """
    if not isinstance(value, dict | list):
        yield place, value
        return
    for name, each in value.items() if isinstance(value, dict) else enumerate(value):
        yield from _flat(each, f"{place}.{name}".lstrip("."))


def raise_together(work: Callable[[], Result]) -> Result:
    """Calls ``work()`` in every process; an error in one of them is raised in all.

    Raises:
        SynchronizedError: some process raised a VmoeError or an OSError; the message has the index
            of the process, unless all raised the same. A single process raises its own error.
    """
    if is_single_process():
        return work()
    results, message = [], ""
    try:
        results.append(work())
    except (VmoeError, OSError) as error:
        status, fields = getattr(error, "status", Failure.status), getattr(error, "fields", {})
        remedies = getattr(error, "remedies", {})
        message = json.dumps([status, str(error), list(fields), remedies], default=str)
    barrier()
    messages = gather(message)
    for i, each in enumerate(messages):
        if each:
            status, line, fields, remedies = json.loads(each)
            place = "" if len(set(messages)) == 1 else f"process {i}: "
            error = (UsageError if status == UsageError.status else Failure)(f"{place}{line}")
            error.fields, error.remedies = dict.fromkeys(fields), remedies
            raise SynchronizedError(error)
    return results[0]


def from_primary(work: Callable[[], Any]) -> Any:
    """The JSON value that ``work()`` returns in the primary process; only that one calls it.

    Every process has to call this; see ``raise_together`` for errors. It is for reads of files: on
    a network file system, processes may see different versions of a file.
    """
    text = raise_together(lambda: json.dumps(work()) if is_primary() else "")
    return json.loads(gather(text)[0])


def synchronized(error: VmoeError) -> VmoeError:
    """A SynchronizedError for an error that every process raises; unchanged with one process."""
    return error if is_single_process() else SynchronizedError(error)


@contextlib.contextmanager
def abort_on_error() -> Iterator[None]:
    """Ends the process at once, with one line, on an error that other processes do not raise.

    Normal cleanup would wait for processes that are gone or wait for this one. The others notice
    the end: in a collective by the closed connection, elsewhere by missing heartbeats.
    """
    try:
        yield
    except BaseException as error:
        if is_single_process() or isinstance(error, SynchronizedError | Stopped):
            raise
        text = " ".join(str(error).split())
        if isinstance(error, jax.errors.JaxRuntimeError) and any(word in text for word in LOST):
            _exit(_lost_process(text[:160]))
        if is_out_of_memory(error):
            _exit(f"{OUT_OF_MEMORY}: use a larger accumulate, model.remat or a smaller batch_size")
        if not isinstance(error, VmoeError):
            traceback.print_exc()
        _exit(text, getattr(error, "status", Failure.status))


def _exit(line: str, status: int = Failure.status) -> None:
    """Ends this process at once, with one line."""
    signals.end(f"vmoe: process {_index}: {line}\n".encode(), status)


def _lost_process(reason: str) -> str:
    return (
        f"another process is gone or does not answer ({reason}); run the same command in all "
        "processes to resume from the newest checkpoint"
    )


@ctypes.CFUNCTYPE(None, ctypes.c_int)
def _on_abort(number: int) -> None:
    """Handles SIGABRT.

    JAX's runtime calls abort() in one of its threads when heartbeats are missing; handlers of
    Python's signal module do not run there.
    """
    _exit(_lost_process("JAX's runtime ended this process; its message is above"))
