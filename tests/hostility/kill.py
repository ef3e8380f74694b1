"""Kill a training run repeatedly, and check that it ends bitwise equal to an uninterrupted run.

    python -m tests.hostility kill [--kills 20] [--steps 1500] [--every 25] [--seed 0]
                                   [--processes 4] [--workers 2]

The run uses every source of randomness (order of the data, augmentation, mixup, dropout, noise,
random priority), a moving average, gradient accumulation and few-shot probes. One run is not
interrupted. The other is killed with SIGKILL and resumed repeatedly, in turn while it saves,
evaluates, trains and starts, and then runs to its end. Every array of the last checkpoint and every
row of the CSV files, except for times, must be bitwise equal. At least one kill must leave an
unfinished checkpoint, and one an unfinished evaluation. Prints a line for each kill; the exit
status is 0 if all checks pass, else 1.

With ``--workers n``, the resumed runs read their images in 0 to n worker processes, in turn, and no
worker may survive a kill. The uninterrupted run reads in threads.

With several processes, each has two devices. Each kill hits the next process. The others must exit
by themselves and log the reason; a process outside a computation exits when JAX misses heartbeats.
Then all processes are started again.
"""

import argparse
import functools
import os
import random
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from rich.console import Console
from rich.table import Table

from tests.command import ROOT, alive, children, free_port
from tests.hostility import TINY
from tests.run_folder import differences, last_step
from vmoe.distributed import HEARTBEAT_TIMEOUT
from vmoe.workdir.layout import read_config

RECIPE = """
from pathlib import Path
from vmoe.config import EvalConfig, FewShotConfig, load, replace

config = replace(
    load(Path({tiny!r})), steps={steps}, log_every=5,
    evaluate_every={every}, checkpoint_every={every},
    ema_decay=0.9, accumulate=2,
    model=dict(dropout=0.1, moe=dict(experts=dict(dropout=0.1), router=dict(priority="random"))),
    evaluations=(EvalConfig(), EvalConfig("small batches", batch_size={batch})),
    fewshot=FewShotConfig(("digits",), every={every}),
)
"""


def start(
    recipe: Path, workdir: Path, processes: int = 1, workers: int = 0
) -> list[subprocess.Popen[bytes]]:
    """Starts the real command in one or more processes, each with some workers."""
    arguments = ["train", "--config", str(recipe), "--workdir", str(workdir)]
    arguments += ["--data.num-workers", str(workers)]
    distributed = {}
    if processes > 1:
        arguments.append("--distributed")
        distributed = {
            "JAX_COORDINATOR_ADDRESS": f"127.0.0.1:{free_port()}",
            "JAX_NUM_PROCESSES": str(processes),
            "JAX_NUM_CPU_DEVICES": "2",
        }
    run = []
    for i in range(processes):
        with log_of(workdir, i).open("ab") as log:
            process = subprocess.Popen(
                [sys.executable, "-m", "vmoe", *arguments],
                stdout=subprocess.DEVNULL,
                stderr=log,
                cwd=ROOT,
                env=os.environ | distributed | {"JAX_PROCESS_ID": str(i)},
            )
        run.append(process)
    return run


def log_of(workdir: Path, process: int) -> Path:
    """The log file of a process."""
    return workdir.parent / f"{workdir.name}.{process}.log"


def _log(workdir: Path, process: int) -> str:
    try:
        return log_of(workdir, process).read_text()
    except FileNotFoundError:
        return ""


def unfinished(workdir: Path) -> list[str]:
    """The names of checkpoints that are being written."""
    return [path.name for path in (workdir / "checkpoints").glob("*.orbax-checkpoint-tmp")]


def starting(workdir: Path, step: int) -> bool:
    return True


def training(workdir: Path, step: int) -> bool:
    return last_step(workdir) >= step


def saving(workdir: Path, step: int) -> bool:
    return last_step(workdir) >= step and bool(unfinished(workdir))


def evaluating(workdir: Path, step: int) -> bool:
    """Whether an evaluation is due and its rows are not written yet."""
    step_now = last_step(workdir)
    evaluated = last_step(workdir, "evaluations")
    return step_now >= step and step_now % _every(workdir) == 0 and evaluated < step_now


@functools.cache
def _every(workdir: Path) -> int:
    return read_config(workdir).evaluate_every


LIMIT = HEARTBEAT_TIMEOUT + 30  # seconds in which all processes end after a kill

# When a kill comes, and its maximum delay after that in seconds.
KILL_PHASES: dict[Callable[[Path, int], bool], float] = {
    saving: 0.01,
    evaluating: 0.05,
    training: 0.2,
    starting: 8.0,
}


class Killed(NamedTuple):
    """The state of a run after a kill."""

    step: int
    unfinished_checkpoint: bool
    """Whether a checkpoint was written in part."""
    unfinished_evaluation: bool
    """Whether an evaluation was running."""
    seconds: float
    """Seconds until the last of the other processes, and of the workers, exited."""


def kill_once(
    run: Sequence[Any],
    workdir: Path,
    phase: Callable[[Path, int], bool],
    step: int,
    delay_fraction: float,
    victim: int = 0,
) -> Killed:
    """Kills one of a run's processes in a phase at or after a step.

    Args:
        run: the processes, just started: Popen objects or similar ones, with their logs in
            ``log_of``.
    """
    while not phase(workdir, step):
        for i, process in enumerate(run):
            if process.poll() is not None:
                log = _log(workdir, i)[-2000:]
                raise SystemExit(f"process {i} ended by itself, {process.returncode}: {log}")
        time.sleep(0.002)
    time.sleep(delay_fraction * KILL_PHASES[phase])
    logged = [len(_log(workdir, i)) for i in range(len(run))]  # before the kill
    workers = children(run[victim].pid)
    run[victim].kill()
    begin = time.monotonic()
    for i, process in enumerate(run):
        try:
            process.wait(max(0.0, begin + LIMIT - time.monotonic()))
        except subprocess.TimeoutExpired:
            for other in run:
                other.kill()
            raise SystemExit(f"process {i} did not end within {LIMIT} s of the kill") from None
        log = _log(workdir, i)[logged[i] :]
        # The last line of the command; JAX may log the same event after it.
        last = [line for line in log.splitlines() if line.startswith("vmoe: ")][-1:]
        if i != victim and "another process is gone" not in "".join(last):
            raise SystemExit(f"process {i}, status {process.returncode}, logged {log}")
    while left := [pid for pid in workers if alive(pid)]:
        if time.monotonic() > begin + LIMIT:
            raise SystemExit(f"processes {left} did not end within {LIMIT} s of the kill")
        time.sleep(0.01)
    seconds = time.monotonic() - begin
    return Killed(last_step(workdir), bool(unfinished(workdir)), evaluating(workdir, 1), seconds)


def wait_for_all(run: list[subprocess.Popen[bytes]]) -> int:
    """Waits for all processes; returns 0, or the exit status of one that failed."""
    return max(process.wait() for process in run)


def add_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--kills", type=int, default=20)
    parser.add_argument("--steps", type=int, default=1500, help="steps of the run")
    parser.add_argument(
        "--every", type=int, default=25, help="steps between evaluations and between checkpoints"
    )
    parser.add_argument("--seed", type=int, default=0, help="seed of the kill times")
    parser.add_argument("--processes", type=int, default=1, help="processes of the run")
    parser.add_argument("--workers", type=int, default=0, help="most workers of a process")


def main(options: argparse.Namespace) -> int:
    with tempfile.TemporaryDirectory() as folder:
        recipe, whole, killed = (Path(folder) / name for name in ("recipe.py", "whole", "killed"))
        batch = 8 if options.processes == 1 else 60
        settings = dict(tiny=TINY, steps=options.steps, every=options.every, batch=batch)
        recipe.write_text(RECIPE.format(**settings))
        print(f"training {options.steps} steps without interruption", flush=True)
        if status := wait_for_all(start(recipe, whole, options.processes)):
            print(_log(whole, 0))
            raise SystemExit(f"the uninterrupted run ended with status {status}")
        table, hit = kill_repeatedly(recipe, killed, options)
        status = wait_for_all(start(recipe, killed, options.processes))
        Console().print(table)
        corrupt = sum(_log(killed, i).count("corrupt") for i in range(options.processes))
        failures = (
            [f"exit status {status}"] if status else differences(whole, killed, options.steps)
        )
        failures += [f"{corrupt} corrupt checkpoints"] if corrupt else []
        failures += [f"no kill came while {name}" for name, count in hit.items() if not count]
    for line in failures:
        print(f"failed: {line}")
    verdict = "NOT equal" if failures else "bitwise equal: every array and every row"
    print(f"{options.kills} kills, {options.steps} steps: {verdict}")
    return 1 if failures else 0


def kill_repeatedly(
    recipe: Path, workdir: Path, options: argparse.Namespace
) -> tuple[Table, dict[str, int]]:
    """Starts and kills a run; returns a table of the kills, and how many hit a write."""
    rng, phases = random.Random(options.seed), list(KILL_PHASES)
    columns = ["kill", "while", "last step", "unfinished checkpoint", "unfinished evaluation"]
    if options.processes > 1:
        phases.remove(starting)  # the others wait for a process that has not connected
        columns += ["process", "others exited after"]
    table, hit = Table(*columns), {"saving": 0, "evaluating": 0}
    for i in range(options.kills):
        phase = phases[i % len(phases)]
        step = (i + 1) * options.steps // (options.kills + 2)
        victim = i % options.processes
        run = start(recipe, workdir, options.processes, i % (options.workers + 1))
        left = kill_once(run, workdir, phase, step, rng.random(), victim)
        unfinished = left.unfinished_checkpoint, left.unfinished_evaluation
        for name, was_hit in zip(hit, unfinished, strict=True):
            hit[name] += was_hit
        words = ["yes" if each else "no" for each in unfinished]
        row = [str(i + 1), phase.__name__, str(left.step), *words]
        if options.processes > 1:
            row += [str(victim), f"{left.seconds:.1f} s"]
        table.add_row(*row)
        print(f"kill {i + 1}/{options.kills} while {row[1]}: step {left.step}", flush=True)
    return table, hit
