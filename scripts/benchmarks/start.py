"""Measure in other processes: start-up of the command, and the layer on several devices."""

import argparse
import functools
import json
import os
import subprocess
import sys
from pathlib import Path

from benchmarks.measure import IMAGE_TOKENS, Row, measured


def start(options: argparse.Namespace) -> list[Row]:
    """Milliseconds of each command, minus those of Python itself; the IQR is of the total."""
    commands = {
        "python": [sys.executable, "-c", ""],
        "import vmoe": [sys.executable, "-c", "import vmoe"],
        "vmoe --help": [sys.executable, "-m", "vmoe", "--help"],
        "vmoe evaluate --help": [sys.executable, "-m", "vmoe", "evaluate", "--help"],
        "vmoe train --help": [sys.executable, "-m", "vmoe", "train", "--help"],
    }
    run = functools.partial(subprocess.run, check=True, capture_output=True)
    runs = {name: functools.partial(run, command) for name, command in commands.items()}
    times = measured(runs, options.repeats)
    python, _ = times.pop("python")
    targets = {"import vmoe": "<= 300 ms", "vmoe --help": "<= 600 ms"}
    return [
        Row("start", {}, name, median - python, iqr, target=targets.get(name, "<= 800 ms"))
        for name, (median, iqr) in times.items()
    ]


def parallel(options: argparse.Namespace) -> list[Row]:
    """The layer over virtual devices, whose number has to be set before JAX starts."""
    settings = {
        "width": options.width,
        "hidden": options.hidden,
        "images": max(8, options.tokens // IMAGE_TOKENS // 8 * 8),
        "experts": max(8, options.experts[0] // 8 * 8),
        "repeats": options.repeats,
    }
    module = "benchmarks.devices"
    command = [
        sys.executable,
        "-m",
        module,
        *(f"--{name}={value}" for name, value in settings.items()),
    ]
    scripts = Path(__file__).parents[1]
    path = os.pathsep.join([str(scripts), os.environ.get("PYTHONPATH", "")])
    result = subprocess.run(
        command,
        check=True,
        stdout=subprocess.PIPE,
        text=True,
        env=os.environ | {"PYTHONPATH": path},
    )
    return [Row(**row) for row in json.loads(result.stdout)]
