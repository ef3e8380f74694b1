"""SIGINT, SIGTERM and SIGHUP: end the process at once, or note the first and end on the second.

SIGHUP, sent when a terminal closes, keeps being ignored if it is at the start (nohup).

No handler raises an exception: Python would swallow it if it came in a callback, such as JAX's
callback of the garbage collector. Python runs handlers in the main thread, between bytecodes, so
compiling can delay them for minutes. A thread therefore also receives every signal.

Standard library only, so that it can be imported before anything else.
"""

import contextlib
import os
import shutil
import signal
import tempfile
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from types import FrameType
from typing import Any

SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
REPEAT = 0.5  # seconds within which signals are one request: `timeout` sends two
SHOW_CURSOR = b"\x1b[?25h\n"  # a live line on a terminal hides it

_unfinished: set[Path] = set()  # to remove when a signal ends the process


def exit_at_once() -> None:
    """From now on a signal ends the process at once, with one line and status 128 + its number.

    ``Signals`` replaces this while it is active.
    """
    _Listener(lambda number: None, _exit).start()


@contextlib.contextmanager
def unfinished(*paths: Path) -> Iterator[None]:
    """Removes files and folders if the context raises an error, or a signal ends the process."""
    _unfinished.update(paths)
    try:
        yield
    except BaseException:
        _remove(paths)
        raise
    finally:
        _unfinished.difference_update(paths)


@contextlib.contextmanager
def temporary_folder(**place: Any) -> Iterator[Path]:
    """A new folder that is removed at the end, also when a signal ends the process.

    Args:
        place: arguments of ``tempfile.mkdtemp``.
    """
    made = tempfile.TemporaryDirectory(ignore_cleanup_errors=True, **place)
    with made as name, unfinished(Path(name)):
        yield Path(name)


class Signals:
    """A context manager that notes the first signal received while it is active.

    A second signal ends the process at once, with status 128 + its number. Python handles signals
    in the main thread only; in another thread nothing is noted.
    """

    def __init__(self) -> None:
        self.requested = ""
        """The name of the first signal received; empty if none."""
        self._received, self._noted = 0, 1  # requests so far, and the number that is only noted
        self._last = -REPEAT  # time of the last request
        self._listener = _Listener(self._note, self._receive)

    def __enter__(self) -> "Signals":
        if threading.current_thread() is threading.main_thread():
            self._listener.start()
        return self

    def __exit__(self, *exception: object) -> None:
        self._listener.stop()

    @contextlib.contextmanager
    def at_once(self) -> Iterator[None]:
        """Inside this context a signal ends the process at once; for waits without a limit."""
        self._noted = 0
        try:
            yield
        finally:
            self._noted = 1

    def _note(self, number: int) -> None:
        self.requested = self.requested or signal.Signals(number).name

    def _receive(self, number: int) -> None:
        self._note(number)
        now = time.monotonic()
        if now - self._last >= REPEAT:
            self._received, self._last = self._received + 1, now
        if self._received > self._noted:
            _exit(number)


class _Listener:
    """Calls two functions with the number of each signal: in the main thread and in its own.

    The main thread's call may come late, and once for several signals of one kind.
    """

    def __init__(self, in_main_thread: Callable[[int], None], in_thread: Callable[[int], None]):
        self._in_main_thread, self._in_thread = in_main_thread, in_thread
        self._previous: dict[int, Any] = {}
        self._thread = threading.Thread(target=self._run, name="signals", daemon=True)

    def start(self) -> None:
        self._read, self._write = os.pipe()
        os.set_blocking(self._write, False)
        self._thread.start()
        self._previous_fd = signal.set_wakeup_fd(self._write, warn_on_full_buffer=False)
        for number in SIGNALS:
            if number != signal.SIGHUP or signal.getsignal(number) != signal.SIG_IGN:
                self._previous[number] = signal.signal(number, self._handle)

    def stop(self) -> None:
        """Restores the earlier handlers, after all signals received so far are handled."""
        if not self._thread.is_alive():
            return
        for number, handler in self._previous.items():
            signal.signal(number, handler or signal.SIG_DFL)  # None: not set from Python
        signal.set_wakeup_fd(self._previous_fd)
        os.close(self._write)
        self._thread.join()
        os.close(self._read)

    def _handle(self, number: int, frame: FrameType | None) -> None:
        self._in_main_thread(number)

    def _run(self) -> None:
        while received := os.read(self._read, 64):
            for number in received:
                if number in SIGNALS:
                    self._in_thread(number)


def _exit(number: int) -> None:
    line = f"vmoe: interrupted by {signal.Signals(number).name}\n".encode()
    end(SHOW_CURSOR + line if os.isatty(2) else line, 128 + number)


def end(line: bytes, status: int) -> None:
    """Ends the process without cleanup: every file on disk is complete, or removed here."""
    try:
        os.write(2, line)
    finally:  # stderr may be gone
        _remove(tuple(_unfinished))
        os._exit(status)


def _remove(paths: Iterable[Path]) -> None:
    for path in paths:
        with contextlib.suppress(OSError):
            if path.is_dir():
                shutil.rmtree(path, ignore_errors=True)
            else:
                path.unlink()
