"""Processes that were forked after JAX has run.

JAX's threads are not copied by a fork, so the child waits for them for ever. Here it gets an error
instead, at the functions that compute.
"""

import os

from vmoe.errors import UsageError

_computing: int | None = None  # the process in which vmoe has computed


def computes() -> None:
    """Notes that this process computes by JAX.

    Raises:
        UsageError: it was forked from one that has.
    """
    global _computing
    check()
    _computing = os.getpid()


def check() -> None:
    """Raises a UsageError in a process that was forked from one that has computed by JAX."""
    if _computing not in (None, os.getpid()):
        raise UsageError(
            f"this process was forked from {_computing}, which has computed by JAX, and would wait "
            'for ever: start processes by multiprocessing.get_context("spawn") or "forkserver", or '
            "compute in the forked ones alone"
        )
