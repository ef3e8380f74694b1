"""How tests run the real command: ``vmoe`` to its end, or ``start`` it and watch.

Both fork a process that has imported everything (``fork_server.py``), which is the real command
without two seconds of imports. ``interpreter`` starts ``python -m vmoe`` itself.
"""

import atexit
import contextlib
import functools
import json
import os
import select
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import BinaryIO

ROOT = Path(__file__).parents[1]
TINY = str(ROOT / "configs" / "tiny.py")
TIMEOUT = 300  # seconds that a command may take to end or to reach a state: none takes a tenth


class Process:
    """The command in a process of its own; as a context manager it is killed when left."""

    def __init__(
        self, words: list[str], cwd: Path, environment: Mapping[str, str], max_file_size: int | None
    ):
        self.returncode: int | None = None
        self._files = contextlib.ExitStack()
        self._stdout, self._stderr = (
            self._files.enter_context(tempfile.TemporaryFile())  # noqa: SIM115 (the stack closes it)
            for _ in range(2)
        )
        report, write_report = os.pipe()
        self._report = self._files.enter_context(os.fdopen(report, "rb", buffering=0))
        request = {
            "words": words,
            "cwd": str(cwd),
            "environment": dict(environment),
            "max_file_size": max_file_size,
        }
        with open(os.devnull) as stdin:
            streams = (stdin.fileno(), self._stdout.fileno(), self._stderr.fileno())
            socket.send_fds(_server(), [json.dumps(request).encode()], [*streams, write_report])
        os.close(write_report)
        self.pid = self._read_report()

    @property
    def stdout(self) -> str:
        """What was printed so far."""
        return _content(self._stdout)

    @property
    def stderr(self) -> str:
        return _content(self._stderr)

    def poll(self) -> int | None:
        """The exit status; None while the process runs."""
        if self.returncode is None and select.select([self._report], [], [], 0)[0]:
            self.returncode = self._read_report()
        return self.returncode

    def wait(self, timeout: float = TIMEOUT) -> int:
        """The exit status, negative for a signal; kills the process after the timeout."""
        if self.returncode is None:
            if not select.select([self._report], [], [], timeout)[0]:
                os.kill(self.pid, signal.SIGKILL)
                raise TimeoutError(f"no end within {timeout} s: {self.stderr}")
            self.returncode = self._read_report()
        return self.returncode

    def wait_until(self, ready: Callable[[], bool]) -> None:
        """Returns once ``ready()``, which must come true while the process runs."""
        deadline = time.monotonic() + TIMEOUT
        while not ready():
            assert self.poll() is None and time.monotonic() < deadline, self.stderr
            time.sleep(0.005)

    def send_signal(self, number: int) -> None:
        if self.poll() is None:
            with contextlib.suppress(ProcessLookupError):
                os.kill(self.pid, number)

    def kill(self) -> None:
        self.send_signal(signal.SIGKILL)
        self.wait()

    def __enter__(self) -> "Process":
        return self

    def __exit__(self, *error: object) -> None:
        self.kill()
        self._files.close()

    def _read_report(self) -> int:
        digits = b""
        while not digits.endswith(b"\n"):
            part = self._report.read(1)
            if not part:
                raise RuntimeError("the fork server ended; its stderr says why")
            digits += part
        return int(digits)


def start(
    *words: str | Path,
    cwd: Path = ROOT,
    environment: Mapping[str, str] | None = None,
    max_file_size: int | None = None,
) -> Process:
    """Starts the command.

    Args:
        environment: variables beside those of the tests.
        max_file_size: in bytes, of the largest file that the process may write.
    """
    return Process(list(map(str, words)), cwd, _environment(environment), max_file_size)


def vmoe(
    *words: str | Path, cwd: Path = ROOT, max_file_size: int | None = None
) -> subprocess.CompletedProcess[str]:
    """Runs the command to its end."""
    with start(*words, cwd=cwd, max_file_size=max_file_size) as process:
        status = process.wait()
        return subprocess.CompletedProcess(words, status, process.stdout, process.stderr)


def interpreter(
    *words: str | Path, under: tuple[str, ...] = (), cwd: Path = ROOT
) -> subprocess.CompletedProcess[str]:
    """Runs ``python -m vmoe`` to its end, ``under`` another command that starts it."""
    return subprocess.run(
        [*under, sys.executable, "-m", "vmoe", *map(str, words)],
        capture_output=True,
        text=True,
        cwd=cwd,
        env=_environment(),
    )


def _environment(more: Mapping[str, str] | None = None) -> dict[str, str]:
    """Of every command: that of the tests, and a width in which no table wraps."""
    return os.environ | {"COLUMNS": "200"} | dict(more or {})


@functools.cache
def _server() -> socket.socket:
    """The socket of this pytest's fork server, which ends when it is closed."""
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    process = subprocess.Popen(
        [sys.executable, "-m", "tests.fork_server", str(theirs.fileno())],
        stdin=subprocess.DEVNULL,
        stdout=subprocess.DEVNULL,
        pass_fds=[theirs.fileno()],
        cwd=ROOT,
        env=os.environ | {"OPENBLAS_NUM_THREADS": "1"},  # a fork has no threads of a pool
    )
    theirs.close()

    @atexit.register
    def end() -> None:
        ours.close()
        process.wait()

    return ours


def _content(file: BinaryIO) -> str:
    """Read without moving the position, which the process shares."""
    return os.pread(file.fileno(), os.fstat(file.fileno()).st_size, 0).decode()
