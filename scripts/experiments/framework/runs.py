"""Experiments that can be stopped at any time and started again: a row for each model and seed.

Commands run over a work folder, several at a time. Finished rows are stored and not made again.
"""

import abc
import argparse
import json
import os
import queue
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from vmoe.config import TrainConfig, replace, to_json
from vmoe.workdir.layout import read_environment, replace_text

ROOT = Path(__file__).parents[3]
ROWS = ROOT / "scripts" / "experiments" / "rows"
"""The committed rows: a JSONL file for each experiment."""
SEEDS = (0, 1, 2)
VERSIONS = ("commit", "python", "machine", "cores", "jax", "jaxlib", "flax", "numpy")
Result = dict[str, Any]
Rows = Mapping[str, Mapping[int, Result]]  # by name of the model and seed
Lines = Sequence[Mapping[str, str]]  # of a table that was written by hand


def read_rows(path: Path) -> Rows:
    """The rows of a file by model and seed, in order; none if there is no file.

    A line is one row. Of rows with the same model and seed the last one counts.

    Raises:
        SystemExit: a line is no row.
    """
    rows: dict[str, dict[int, Result]] = {}
    for i, line in enumerate(path.read_text().splitlines() if path.is_file() else (), 1):
        try:
            row = json.loads(line)
            rows.setdefault(row["model"], {})[row["seed"]] = row
        except (ValueError, KeyError):
            raise SystemExit(f"{path}, line {i}: no row; remove it") from None
    return {model: dict(sorted(rows[model].items())) for model in sorted(rows)}


class Experiment:
    """Rows that are made once.

    Each command has cores of its own. SIGTERM is passed on to the running commands; a training run
    then saves a checkpoint.

    Attributes:
        needs: a key that rows of earlier versions lack; these are made again.
    """

    needs = "model"

    def __init__(self, options: argparse.Namespace) -> None:
        """Makes the folders.

        Args:
            options: of ``argument_parser``: ``workdir``, for what the commands write and for their
                logs; ``rows``, a JSONL file; ``jobs``, commands at a time, at most one per core.
        """
        cores = sorted(os.sched_getaffinity(0))
        self.options = options
        self.workdir, self.path = options.workdir.absolute(), options.rows.absolute()
        for folder in (self.workdir, self.path.parent):
            folder.mkdir(parents=True, exist_ok=True)
        rows = read_rows(self.path)
        self.stored = {(model, seed): row for model in rows for seed, row in rows[model].items()}
        self.writing = threading.Lock()
        self.jobs = min(options.jobs, len(cores))
        self.cores: queue.SimpleQueue[tuple[int, ...]] = queue.SimpleQueue()
        for job in range(self.jobs):
            self.cores.put(tuple(cores[job :: self.jobs]))
        self.started: list[subprocess.Popen[str]] = []
        signal.signal(signal.SIGTERM, self._stop)

    def _stop(self, number: int, _: Any) -> None:
        for process in self.started:
            process.terminate()  # nothing happens to one that has ended
        raise SystemExit(128 + number)  # cancels what has not started

    def all(self, function: Callable[..., Result], arguments: Iterable[Any]) -> list[Result]:
        """The results for all arguments, in order."""
        with ThreadPoolExecutor(self.jobs) as pool:
            return list(pool.map(lambda each: function(*each), arguments))

    def once(self, model: str, seed: int, function: Callable[[], Result]) -> Result:
        """The stored row; if there is none, one with what the function returns, which is stored."""
        row = self.stored.get((model, seed))
        if row is None or self.needs not in row:
            start = time.perf_counter()
            line = json.dumps({"model": model, "seed": seed, **function()})
            with self.writing, self.path.open("ab", buffering=0) as file:
                file.write(f"{line}\n".encode())  # at once, so that a signal leaves no half of it
            row = self.stored[model, seed] = json.loads(line)
            seconds = time.perf_counter() - start
            print(f"{model}-{seed}: {seconds:,.0f} s", file=sys.stderr, flush=True)
        return row

    def python(self, *arguments: Any) -> str:
        """What a Python command prints.

        Raises:
            SystemExit: it fails; says how it ended and names its log.
        """
        cores = self.cores.get()
        path = self.workdir / f"log-{cores[0]}.txt"
        command = [sys.executable, *map(str, arguments)]
        try:
            os.sched_setaffinity(0, cores)  # of this thread, whose child inherits it
            with (
                path.open("ab") as log,
                subprocess.Popen(
                    command, stdout=subprocess.PIPE, stderr=log, text=True, cwd=ROOT
                ) as process,
            ):
                self.started.append(process)
                out, _ = process.communicate()
        finally:
            self.cores.put(cores)
        if process.returncode:
            lines = path.read_text(errors="replace").splitlines() or ["no message"]
            call = " ".join(command[1:])
            raise SystemExit(f"{call}: exit status {process.returncode}: {lines[-1]} (log: {path})")
        return out

    def vmoe(self, *arguments: Any) -> str:
        """What a command of vmoe prints; errors as for ``python``."""
        return self.python("-m", "vmoe", *arguments)

    def evaluated(self, checkpoint: Path | str, *data: str, options: Sequence[Any] = ()) -> Result:
        """What ``vmoe evaluate --json`` prints."""
        words = ("--checkpoint", checkpoint, "--data", *data, *options, "--json")
        return json.loads(self.vmoe("evaluate", *words))

    def probed(
        self, checkpoint: Path | str, *data: str, shots: Iterable[int], seed: int
    ) -> dict[str, list[float]]:
        """Test accuracies of linear probes of the features, by data, for each number of shots."""
        words = ("--checkpoint", checkpoint, "--data", *data, "--shots", *shots)
        out = self.vmoe("probe", *words, "--choose-l2", "train", "--seed", seed, "--json")
        return json.loads(out)["accuracy"]


class Comparison(Experiment, abc.ABC):
    """Models that are trained with several seeds, and a row of figures for each run."""

    @abc.abstractmethod
    def settings(self, model: str) -> Result:
        """What the rows of a model are made with, which a stored row must agree with."""

    @abc.abstractmethod
    def measure(self, model: str, seed: int) -> Result:
        """Trains a model, and returns what follows the settings in its row."""

    def seeds(self, model: str) -> Iterable[int]:
        """The seeds of a model, unless ``--seeds`` names others."""
        return SEEDS

    def run(self, *groups: Iterable[str]) -> Rows:
        """Makes the rows that are missing; returns all rows of the file.

        Args:
            groups: of models, one group after the other; the models of a group, seed by seed.

        Raises:
            SystemExit: a command fails, or a row was made with other settings.
        """
        given = self.options.seeds
        for group in groups:
            pairs = [(model, seed) for model in group for seed in given or self.seeds(model)]
            self.all(self.row, sorted(pairs, key=lambda pair: pair[1]))
        return read_rows(self.path)

    def row(self, model: str, seed: int) -> Result:
        """The stored row, or a new one."""
        settings = self.settings(model)
        row = self.once(model, seed, lambda: settings | self.measure(model, seed))
        if different := [key for key in settings if row.get(key) != settings[key]]:
            made = f"{model}, seed {seed}: made with other {', '.join(different)}"
            raise SystemExit(f"{self.path}: {made}; use other --rows")
        return row

    def train(self, config: TrainConfig, workdir: Path, seed: int, *options: Any) -> None:
        """Trains a model, or resumes its training."""
        recipe = workdir.with_suffix(".json")
        replace_text(recipe, to_json(config))
        self.vmoe("train", "--config", recipe, "--workdir", workdir, "--seed", seed, *options)


def argument_parser(
    name: str, description: str, models: Collection[str] = ()
) -> argparse.ArgumentParser:
    """A parser with the options of an ``Experiment``.

    Args:
        name: the name of the experiment, of its folder of runs and of its file of rows.
        description: the docstring of its command.
        models: the names of all models; without any, there is no choice of models and seeds.
    """
    parser = argparse.ArgumentParser(
        f"python -m scripts.experiments {name}", description=description.splitlines()[0]
    )
    parser.add_argument("--workdir", type=Path, default=ROOT / "runs" / name)
    parser.add_argument("--rows", type=Path, default=ROWS / f"{name}.jsonl", help="a JSONL file")
    parser.add_argument("--jobs", type=int, default=2, help="commands at a time")
    if models:
        parser.add_argument("--seeds", type=int, nargs="+")
        parser.add_argument(
            "--only", nargs="+", default=list(models), choices=models, help="models"
        )
    return parser


def in_steps(config: TrainConfig, steps: int | None) -> TrainConfig:
    """The config with another number of steps, and with no longer warmup than half of them."""
    steps = steps or config.total_steps
    warmup = min(config.optim.warmup_steps, steps // 2)
    return replace(config, steps=steps, optim={"warmup_steps": warmup})


def versions(workdir: Path) -> Result:
    """The versions and the machine of a run."""
    environment = read_environment(workdir)
    return {name: environment[name] for name in VERSIONS}
