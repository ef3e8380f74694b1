"""Measure programs in turn and return table rows."""

import datetime
import functools
import json
import platform
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np

from vmoe.host.cores import cores

IMAGE_TOKENS = 196
BY_TOKENS = ("dense MLP", "batched experts", "layer")


class Row(NamedTuple):
    """One measurement, and its ratio to a reference that was measured in the same run."""

    section: str
    case: dict[str, Any]
    what: str
    ms: float | None
    iqr_ms: float | None
    ratio: float | None = None
    to: str = ""
    target: str = ""
    temp_mb: float | None = None
    sent_mb: float | None = None
    cores: int | None = None
    rate: float | None = None


class Program(NamedTuple):
    """A compiled function with its arguments, its temporary memory and its compile time."""

    run: Callable[[], Any]
    temp_mb: float = np.nan
    compile_s: float = 0.0


def compiled(function: Callable[..., Any], *arguments: Any) -> Program:
    start = time.perf_counter()
    program = jax.jit(function).lower(*arguments).compile()
    seconds = time.perf_counter() - start
    return Program(functools.partial(program, *arguments), temp_mb(program), seconds)


def temp_mb(program: jax.stages.Compiled) -> float:
    """XLA's estimate of a program's temporary memory; NaN if there is none."""
    memory = program.memory_analysis()
    return memory.temp_size_in_bytes / 1e6 if memory else np.nan


def measured(
    programs: dict[str, Callable[[], Any]],
    repeats: int,
    clock: Callable[[], float] = time.perf_counter,
) -> dict[str, tuple[float, float]]:
    """Median and interquartile range of each in ms; programs run in turn, after a warm-up turn."""
    times: dict[str, list[float]] = {name: [] for name in programs}
    for turn in range(repeats + 1):
        for name, run in programs.items():
            start = clock()
            jax.block_until_ready(run())
            if turn:
                times[name].append(1e3 * (clock() - start))
    quartiles = {name: np.quantile(values, [0.25, 0.5, 0.75]) for name, values in times.items()}
    return {name: (float(q[1]), float(q[2] - q[0])) for name, q in quartiles.items()}


def rows_of(
    section: str,
    case: dict[str, Any],
    programs: dict[str, Program],
    repeats: int,
    ratios: dict[str, list[tuple[str, str]]],
) -> list[Row]:
    """A row per program and reference; ``ratios`` has the references and targets by program."""
    times = measured({name: program.run for name, program in programs.items()}, repeats)
    rows = []
    for name, (median, iqr) in times.items():
        for to, target in ratios.get(name, [("", "")]):
            ratio = median / times[to][0] if to else None
            temp = programs[name].temp_mb
            rows.append(Row(section, case, name, median, iqr, ratio, to, target, temp))
    return rows


def both_ways(function: Callable[..., jax.Array], *arguments: Any) -> dict[str, Program]:
    """The function, and the gradient of a scalar of it with respect to all arguments."""

    def loss(*arguments: Any) -> jax.Array:
        return (function(*arguments) ** 2).sum()

    gradient = jax.grad(loss, argnums=tuple(range(len(arguments))))
    return {"forward": compiled(function, *arguments), "f+b": compiled(gradient, *arguments)}


def run_module(module: str, *arguments: str) -> Any:
    """Runs a module in a new process, and returns the JSON that it prints."""
    result = subprocess.run(
        [sys.executable, "-m", module, *arguments],
        check=True,
        stdout=subprocess.PIPE,
        text=True,
        cwd=Path(__file__).parents[2],
    )
    return json.loads(result.stdout)


def machine() -> dict[str, str]:
    return {
        "device": jax.devices()[0].device_kind,
        "cores": str(cores()),
        "system": platform.platform(),
        "jax": jax.__version__,
        "date": datetime.date.today().isoformat(),
    }
