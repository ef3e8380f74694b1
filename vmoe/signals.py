"""SIGINT and SIGTERM: the first one asks for a stop, a second one ends the process at once.

Standard library only, so that it can be imported before anything else.
"""

import os
import signal
import threading
from types import FrameType
from typing import Any


class Signals:
    """Notes the first signal while it is entered; a context manager.

    Python handles signals in the main thread only: in another thread nothing is noted.
    """

    def __init__(self) -> None:
        self.requested = ""
        """The name of the signal that asks for a stop; empty if there was none."""
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
            os._exit(128 + number)  # silently: every file on the disk is complete
        self.requested = signal.Signals(number).name
