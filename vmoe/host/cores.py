"""The processor cores of this process."""

import math
import os
from pathlib import Path

QUOTA = Path("/sys/fs/cgroup/cpu.max")  # of a container on Linux: "max PERIOD" or "TIME PERIOD"


def core_numbers() -> list[int]:
    """The cores on which this process may run."""
    if hasattr(os, "sched_getaffinity"):  # Linux; a scheduler or taskset may have left some out
        return sorted(os.sched_getaffinity(0))
    return list(range(os.cpu_count() or 1))


def cores() -> int:
    """The number of cores on which this process may run."""
    return len(core_numbers())


def quota() -> float:
    """The number of cores that a container may keep busy; infinite if there is no limit of time."""
    try:
        time, period = QUOTA.read_text().split()
        return int(time) / int(period)
    except (OSError, ValueError):  # there is none
        return math.inf


def usable_cores() -> int:
    """The number of cores that this process can keep busy, if it is alone."""
    return max(1, int(min(cores(), quota())))
