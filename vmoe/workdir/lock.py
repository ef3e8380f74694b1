"""One run at a time in a run folder: a lock that the system releases when the process ends."""

import contextlib
import fcntl
import os
import socket
import sys
import time
from collections.abc import Iterator
from pathlib import Path

from vmoe import distributed
from vmoe.errors import Failure, UsageError, VmoeError
from vmoe.host.retry import can_pass, retried
from vmoe.workdir.layout import steps_of

LOCK = ".lock"
NO_LOCK = "no lock"  # stands for the content of a lock that a process does not see
PAUSES = (1, 5, 20, 60)  # seconds before what the processes see is compared again


@contextlib.contextmanager
def lock_workdir(workdir: Path) -> Iterator[None]:
    """Locks a run folder against other runs, and creates it if it does not exist.

    The primary process holds the lock. The system releases it when that process ends, even if it is
    killed. If the file system has no locks, a line on stderr reports this.

    Raises:
        UsageError: another run holds the lock, the folder cannot be written, or not every process
            of this run sees it.
        Failure: it cannot be written for a temporary reason, such as a full disk.
    """
    with contextlib.ExitStack() as stack:

        def lock() -> None:
            if distributed.is_primary():
                stack.enter_context(_lock(workdir))

        distributed.raise_together(lock)
        _check_shared(workdir)
        yield


@contextlib.contextmanager
def _lock(workdir: Path) -> Iterator[None]:
    try:
        workdir.mkdir(parents=True, exist_ok=True)
        file = (workdir / LOCK).open("ab+", buffering=0)  # closing it writes nothing
    except OSError as error:
        raise _not_writable(workdir, error) from None
    with file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            file.seek(0)
            raise UsageError(
                f"workdir {workdir}: already in use by process {file.read().decode()}; wait until "
                "it ends, or use another workdir"
            ).remedied_by(workdir=None) from None
        except OSError as error:  # some file systems of clusters have no locks
            print(
                f"{workdir / LOCK}: cannot be locked ({error.strerror}); make sure that no other "
                "run uses this workdir",
                file=sys.stderr,
            )
        try:
            file.truncate(0)
            file.write(f"{os.getpid()} on {socket.gethostname()}".encode())
            os.fsync(file.fileno())  # NFS shows other hosts only what is synced
        except OSError as error:
            raise _not_writable(workdir, error) from None
        yield


def _not_writable(workdir: Path, error: OSError) -> VmoeError:
    """A Failure if the reason is temporary, such as a full disk; else a UsageError."""
    kind = Failure if can_pass(error) else UsageError
    return kind(f"workdir {workdir}: {error.strerror}")


def _check_shared(workdir: Path) -> None:
    """Checks that all processes see the same folder; else each would resume from its own files.

    A network file system may show a process an earlier list of checkpoints for a minute, or, if the
    process has looked for the folder before it was made, no folder.
    """
    path = workdir / LOCK

    def seen() -> str:
        try:
            return f"{retried(path, path.read_text)}\n{steps_of(workdir)}"
        except FileNotFoundError:
            return NO_LOCK

    pauses = iter(PAUSES)
    while True:
        first, *others = distributed.gather(distributed.raise_together(seen))
        differing = [i for i, other in enumerate(others, start=1) if other != first]
        if not differing:
            return
        locks = {each.partition("\n")[0] for each in (first, *others)} - {NO_LOCK}
        pause = next(pauses, None) if len(locks) == 1 else None
        if pause is None:
            raise distributed.synchronized(
                UsageError(
                    f"workdir {workdir}: process {differing[0]} does not see what the primary "
                    "process sees there; use a workdir that all processes share"
                ).remedied_by(workdir=None)
            )
        time.sleep(pause)
