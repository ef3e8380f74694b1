"""SIGINT and SIGTERM: the first requests a stop, a second ends the process at once.

Standard library only, so that it can be imported before anything else.
"""

import os
import signal
import threading
from types import FrameType
from typing import Any


class Signals:
    """A context manager that records the first signal received while it is active.

    Python handles signals in the main thread only; in another thread nothing is recorded.
    """

    def __init__(self) -> None:
        self.requested = ""
        """The name of the first signal received; empty if none."""
        self._previous: dict[int, Any] = {}

    def __enter__(self) -> "Signals":
        if threading.current_thread() is threading.main_thread():
            for number in (signal.SIGINT, signal.SIGTERM):
                self._previous[number] = signal.signal(number, self._handle)
        return self

    def __exit__(self, *exception: object) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)

    def _handle(self, number: int, frame: FrameType | None) -> None:
        if self.requested:
            os._exit(128 + number)  # without cleanup: every file on disk is complete
        self.requested = signal.Signals(number).name
