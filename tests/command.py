"""Run the real command in tests.

``vmoe`` runs it in the process of the test, which has imported what it needs and may have compiled
it. What a process of its own is needed for (signals, limits, environment, exit) takes ``start``,
which returns while it runs, or ``forked``, which waits until it exits. Both fork a server that has
already imported vmoe (``fork_server.py``), which saves two seconds of imports per command.
``interpreter`` runs ``python -m vmoe`` without that server. Tests that use these three have the
mark ``process``.
"""

import atexit
import contextlib
import functools
import io
import json
import logging
import os
import re
import select
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from subprocess import CompletedProcess
from typing import BinaryIO

import pytest

from vmoe.cli.main import main

ROOT = Path(__file__).parents[1]
TINY = str(ROOT / "tests" / "tiny.py")
# A fork would lack the threads that these libraries start when they are imported.
TIME = r"\d{4}-\d\d-\d\d \d\d:\d\d:\d\d"
ONE_THREAD = {"OPENBLAS_NUM_THREADS": "1", "JE_ARROW_MALLOC_CONF": "background_thread:false"}
TIMEOUT = 1200  # seconds to wait for a command to exit or reach a state; none needs 30 alone
WIDTH = "200"  # in characters; no table wraps


def vmoe(*arguments: str | Path, cwd: Path = ROOT, width: str = WIDTH) -> CompletedProcess[str]:
    """Runs the command in this process, and gives back what it changes there.

    A warning is an error, as in other tests.
    """
    # Imported here: modules that annotate axes are imported after pytest_configure (conftest.py).
    from vmoe.checkpoints.orbax_logging import hide_late_reports

    hide_late_reports()  # installs a hook once a process, which would be lost below
    out, err = io.StringIO(), io.StringIO()
    disabled = logging.root.manager.disable
    with pytest.MonkeyPatch.context() as patch, contextlib.chdir(cwd):
        patch.setenv("COLUMNS", width)
        patch.setattr(sys, "unraisablehook", sys.unraisablehook)
        with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
            try:
                status = main(list(map(str, arguments)))
            except SystemExit as end:
                status = end.code
            finally:
                logging.disable(disabled)
    return CompletedProcess(arguments, status, out.getvalue(), err.getvalue())


def without_times(stderr: str) -> list[str]:
    """The lines of a run without the time of day, which they have as stderr is no terminal."""
    return [re.sub(f"^{TIME} ", "", line) for line in stderr.splitlines()]


class Process:
    """The command as a process; leaving its context manager kills it."""

    def __init__(
        self,
        arguments: list[str],
        cwd: Path,
        environment: Mapping[str, str],
        max_file_size: int | None,
        log: Path | None,
        output: int | None,
    ):
        self.returncode: int | None = None
        self._files = contextlib.ExitStack()
        opened = (
            path.open("a+b") if path else tempfile.TemporaryFile()  # noqa: SIM115 (the stack closes)
            for path in (None, log)
        )
        self._stdout, self._stderr = map(self._files.enter_context, opened)
        report, write_report = os.pipe()
        self._report = self._files.enter_context(os.fdopen(report, "rb", buffering=0))
        request = {
            "arguments": arguments,
            "cwd": str(cwd),
            "environment": dict(environment),
            "max_file_size": max_file_size,
        }
        with open(os.devnull) as stdin:
            files = (self._stdout.fileno(), self._stderr.fileno())
            streams = (stdin.fileno(), *(files if output is None else (output, output)))
            socket.send_fds(_server(), [json.dumps(request).encode()], [*streams, write_report])
        os.close(write_report)
        self.pid = self._read_report()

    @property
    def stdout(self) -> str:
        """The output so far."""
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
        """Waits until ``ready()`` is true; fails if the process exits first."""
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
            byte = self._report.read(1)
            if not byte:
                raise RuntimeError("the fork server exited; see its stderr")
            digits += byte
        return int(digits)


def start(
    *arguments: str | Path,
    cwd: Path = ROOT,
    environment: Mapping[str, str] | None = None,
    max_file_size: int | None = None,
    log: Path | None = None,
    output: int | None = None,
) -> Process:
    """Starts the command.

    Args:
        environment: variables to add to the environment of the test process.
        max_file_size: the size in bytes of the largest file that the process may write.
        log: the file to which its stderr is appended; a temporary one by default.
        output: a descriptor that the process gets as its stdout and stderr; this one is closed.
    """
    environment = _environment(environment)
    try:
        return Process(list(map(str, arguments)), cwd, environment, max_file_size, log, output)
    finally:
        if output is not None:
            os.close(output)


def forked(
    *arguments: str | Path,
    cwd: Path = ROOT,
    environment: Mapping[str, str] | None = None,
    max_file_size: int | None = None,
) -> CompletedProcess[str]:
    """Runs the command in its own process until it exits; takes the arguments of ``start``."""
    with start(
        *arguments, cwd=cwd, environment=environment, max_file_size=max_file_size
    ) as process:
        status = process.wait()
        return CompletedProcess(arguments, status, process.stdout, process.stderr)


def interpreter(
    *arguments: str | Path, under: tuple[str, ...] = (), cwd: Path = ROOT
) -> CompletedProcess[str]:
    """Runs ``python -m vmoe`` until it exits; ``under`` is a command to run it with (setpriv)."""
    return subprocess.run(
        [*under, sys.executable, "-m", "vmoe", *map(str, arguments)],
        capture_output=True,
        text=True,
        cwd=cwd,
        env=_environment(),
    )


def children(pid: int) -> list[int]:
    """The processes that the main thread of a process has started, on Linux; its workers."""
    try:
        text = Path(f"/proc/{pid}/task/{pid}/children").read_text()
    except (FileNotFoundError, ProcessLookupError):  # it has ended
        text = ""
    return [int(child) for child in text.split()]


def alive(pid: int) -> bool:
    """Whether a process has not ended, on Linux; one that nobody has waited for has ended."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False


def free_port() -> int:
    """A port at which the processes of a run can meet."""
    with socket.socket() as sock:
        sock.bind(("127.0.0.1", 0))
        return sock.getsockname()[1]


def _environment(more: Mapping[str, str] | None = None) -> dict[str, str]:
    """The test process's environment, a width at which no table wraps, and ``more``."""
    return os.environ | {"COLUMNS": WIDTH} | dict(more or {})


@functools.cache
def _server() -> socket.socket:
    """The socket to this pytest process's fork server; closing it stops the server."""
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    process = subprocess.Popen(
        [sys.executable, "-m", "tests.fork_server", str(theirs.fileno())],
        stdin=subprocess.DEVNULL,
        stdout=subprocess.DEVNULL,
        pass_fds=[theirs.fileno()],
        cwd=ROOT,
        env=os.environ | ONE_THREAD,
    )
    theirs.close()

    @atexit.register
    def end() -> None:
        ours.close()
        process.wait()

    return ours


def _content(file: BinaryIO) -> str:
    """Reads a file without moving its position, which the process shares."""
    return os.pread(file.fileno(), os.fstat(file.fileno()).st_size, 0).decode()
