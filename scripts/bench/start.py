"""Measure in other processes: start-up of the command, and the layer on several devices."""

import argparse
import functools
import subprocess
import sys
from collections.abc import Callable
from typing import Any

from scripts.bench.measure import IMAGE_TOKENS, Row, measured, run_module


def start(options: argparse.Namespace) -> list[Row]:
    """Milliseconds of each command, minus the time of Python itself; the IQR is of the total."""
    commands = {
        "python": [sys.executable, "-c", ""],
        "import vmoe": [sys.executable, "-c", "import vmoe"],
        "vmoe --help": [sys.executable, "-m", "vmoe", "--help"],
        "vmoe evaluate --help": [sys.executable, "-m", "vmoe", "evaluate", "--help"],
        "vmoe train --help": [sys.executable, "-m", "vmoe", "train", "--help"],
    }
    run = functools.partial(subprocess.run, check=True, capture_output=True)
    runs: dict[str, Callable[[], Any]] = {
        name: functools.partial(run, command) for name, command in commands.items()
    }
    times = measured(runs, options.repeats)
    python, _ = times.pop("python")
    targets = {"import vmoe": "<= 300 ms", "vmoe --help": "<= 600 ms"}
    return [
        Row("start", {}, name, median - python, iqr, target=targets.get(name, "<= 800 ms"))
        for name, (median, iqr) in times.items()
    ]


def parallel(options: argparse.Namespace) -> list[Row]:
    """The layer on virtual devices, in a new process: their number is set before JAX starts."""
    settings = {
        "width": options.width,
        "hidden": options.hidden,
        "images": max(8, options.tokens // IMAGE_TOKENS // 8 * 8),
        "experts": max(8, options.experts[0] // 8 * 8),
        "repeats": options.repeats,
    }
    arguments = (f"--{name}={value}" for name, value in settings.items())
    return [Row(**row) for row in run_module("scripts.bench.devices", *arguments)]
