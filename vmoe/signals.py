"""SIGINT and SIGTERM: end the process at once, or note the first one and end it on the second.

No handler raises an exception: one that is raised in a callback, such as JAX's of the garbage
collector, would be swallowed. Python runs handlers in the main thread, between bytecodes, so
compiling can delay them for minutes; a thread therefore receives every signal too.

Standard library only, so that it can be imported before anything else.
"""

import contextlib
import os
import signal
import threading
import time
from collections.abc import Callable, Iterator
from types import FrameType
from typing import Any

SIGNALS = (signal.SIGINT, signal.SIGTERM)
REPEAT = 0.5  # seconds within which signals are one request: `timeout` sends two
SHOW_CURSOR = b"\x1b[?25h\n"  # a live line on a terminal hides it


def exit_at_once() -> None:
    """From now on a signal ends the process at once, with one line and status 130 or 143.

    ``Signals`` replaces this while it is active.
    """
    _Listener(lambda number: None, _exit).start()


class Signals:
    """A context manager that notes the first signal received while it is active.

    A second signal ends the process at once, with status 130 or 143. Python handles signals in the
    main thread only; in another thread nothing is noted.
    """

    def __init__(self) -> None:
        self.requested = ""
        """The name of the first signal received; empty if none."""
        self._received, self._noted = 0, 1  # requests so far, and how many of them are only noted
        self._last = -REPEAT  # time of the last one
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
            self._previous[number] = signal.signal(number, self._handle)

    def stop(self) -> None:
        """Restores what ``start`` replaced, after all signals received so far are handled."""
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
    """Ends the process without cleanup: every file on disk is complete."""
    try:
        if os.isatty(2):
            os.write(2, SHOW_CURSOR)
        os.write(2, f"vmoe: interrupted by {signal.Signals(number).name}\n".encode())
    finally:  # stderr may be closed
        os._exit(128 + number)
