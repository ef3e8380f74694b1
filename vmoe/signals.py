"""SIGINT and SIGTERM: the first asks a run to save and stop, a second one leaves at once.

A signal to one of several processes asks all of them: they stop after the same step.
"""

import os
import signal
import threading
from types import FrameType, TracebackType

from vmoe import distributed


class Interrupted(Exception):
    """Work that may be given up was given up, because a signal asks for a stop."""


class Signals:
    """Notes the first signal while it is entered; a context manager.

    In a thread other than the main one, where Python lets nobody handle signals, it notes none.
    """

    def __init__(self) -> None:
        self.asked = ""
        """The name of the signal that asks for a stop; empty if there was none."""
        self._before: dict[int, object] = {}

    def __enter__(self) -> "Signals":
        if threading.current_thread() is threading.main_thread():
            for number in (signal.SIGINT, signal.SIGTERM):
                self._before[number] = signal.signal(number, self._note)
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def check(self) -> None:
        """Raises Interrupted in every process once a stop is asked for in one."""
        if distributed.any_process(bool(self.asked)):
            raise Interrupted

    def _note(self, number: int, frame: FrameType | None) -> None:
        if self.asked:
            os._exit(128 + number)  # without a word: what is on the disk is whole
        self.asked = signal.Signals(number).name
