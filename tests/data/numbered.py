"""Batches for the tests of readers, in a module of its own, so that workers import little."""

import os
import random
import signal
import threading
import time
from multiprocessing.connection import Connection
from typing import Any

import numpy as np

from vmoe.data.workers import Workers
from vmoe.errors import UsageError


class Numbers:
    """Batches that hold their number, and the process that read them."""

    def __getitem__(self, number: int) -> dict[str, Any]:
        time.sleep(random.random() / 50)
        array = np.full((number % 3 + 1, 1000), number, np.int32)
        flags = np.arange(number) % 2 == 0
        settings = os.environ.get("JAX_PLATFORMS")
        return {"array": array, "flags": flags, "pid": os.getpid(), "jax": settings}


class Failing:
    """Batches whose third raises an error, or never comes, or ends the process."""

    def __init__(self, how: str):
        self.how = how

    def __getitem__(self, number: int) -> int:
        if number == 2:
            match self.how:
                case "error":
                    raise UsageError("photos/3.png: cannot be read")
                case "connection":
                    raise ConnectionResetError("the server of the data is gone")
                case "hang":
                    threading.Event().wait()
                case "killed":
                    os.kill(os.getpid(), signal.SIGKILL)
                case "exit":
                    os._exit(3)
        return number


class Halves:
    """Batches in two parts; both parts of the third cannot be read, the first one later."""

    parts = 2

    def __getitem__(self, number: int) -> list[int]:
        return self.joined([self.part(2 * number), self.part(2 * number + 1)])

    def part(self, number: int) -> int:
        if number in (4, 5):
            time.sleep((5 - number) / 20)
            raise UsageError(f"photos/{number}.png: cannot be read")
        return number

    def joined(self, parts: list[int]) -> list[int]:
        return parts[:]


def blocked_after_failing(connection: Connection) -> None:
    """Sends the signals that are blocked after workers could not be started.

    Call it in a daemonic process, which may start no other.
    """
    try:
        Workers(1)
    except AssertionError:
        connection.send(signal.pthread_sigmask(signal.SIG_BLOCK, ()))
