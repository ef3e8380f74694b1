"""SIGINT and SIGTERM: end the process at once, or note the first one and end it on the second.

No handler raises an exception: one that arrives in a callback, such as JAX's of the garbage
collector, would be swallowed. Python runs handlers only when the main thread executes bytecode,
which compiling can keep from it for minutes, so a thread receives every signal too.

Standard library only, so that it can be imported before anything else.
"""

import contextlib
import os
import signal
import threading
from collections.abc import Callable, Iterator
from types import FrameType
from typing import Any

SIGNALS = (signal.SIGINT, signal.SIGTERM)
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
        self._received, self._noted = 0, 1  # signals so far, and how many of them are only noted
        self._listener = _Listener(self._note, self._receive)

    def __enter__(self) -> "Signals":
        if threading.current_thread() is threading.main_thread():
            self._listener.start()
        return self

    def __exit__(self, *exception: object) -> None:
        self._listener.stop()

    @contextlib.contextmanager
    def at_once(self) -> Iterator[None]:
        """Inside, a signal ends the process at once, even one noted before: for endless waits."""
        self._noted = 0
        if self.requested:
            _exit(signal.Signals[self.requested])
        yield
        self._noted = 1

    def _note(self, number: int) -> None:
        self.requested = self.requested or signal.Signals(number).name

    def _receive(self, number: int) -> None:
        self._note(number)
        self._received += 1
        if self._received > self._noted:
            _exit(number)


class _Listener:
    """Calls two functions with the number of each signal: in the main thread and in its own.

    The main thread's call may come late, and once for several signals of one kind. A signal that
    the process was started to ignore stays ignored.
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
            if signal.getsignal(number) is not signal.SIG_IGN:
                self._previous[number] = signal.signal(number, self._handle)

    def stop(self) -> None:
        """Restores what ``start`` replaced, after all signals received so far are handled."""
        if not self._thread.is_alive():
            return
        for number, handler in self._previous.items():
            signal.signal(number, handler)
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
    if os.isatty(2):
        os.write(2, SHOW_CURSOR)
    os.write(2, f"vmoe: interrupted by {signal.Signals(number).name}\n".encode())
    os._exit(128 + number)
