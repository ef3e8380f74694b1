"""Experiments that can be stopped at any time and started again, and the Markdown of their results.

Commands run over a work folder, several at a time. Finished steps are stored and not repeated.
"""

import abc
import argparse
import json
import os
import queue
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np

from vmoe.config import TrainConfig, to_json
from vmoe.workdir.layout import read_environment, replace_text

ROOT = Path(__file__).parents[1]
ROWS = ROOT / "scripts" / "rows"
"""A folder of committed rows for each experiment."""
SEEDS = (0, 1, 2)
VERSIONS = ("commit", "python", "machine", "cores", "jax", "jaxlib", "flax", "numpy")
Result = dict[str, Any]
Rows = Mapping[str, Mapping[int, Result]]  # by name of the model and seed


class Experiments:
    """Steps of a script that can be stopped at any time and started again.

    A step is a function that runs commands, each on cores of its own. SIGTERM is passed on to the
    running commands; a training run then saves a checkpoint.
    """

    def __init__(self, workdir: Path, results: Path, jobs: int) -> None:
        """Makes both folders.

        Args:
            workdir: for what the commands write, and for their logs.
            results: for one JSON file per step.
            jobs: commands at a time; at most one per core.
        """
        cores = sorted(os.sched_getaffinity(0))
        self.workdir, self.results, self.jobs = workdir, results, min(jobs, len(cores))
        for folder in (workdir, results):
            folder.mkdir(parents=True, exist_ok=True)
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

    def once(self, name: str, function: Callable[[], Result], *, needs: str = "") -> Result:
        """The stored result of a name; if there is none, calls the function and stores its result.

        Args:
            needs: a key without which a stored result does not count.
        """
        path = self.results / f"{name}.json"
        if not path.exists() or (needs and needs not in json.loads(path.read_text())):
            start = time.perf_counter()
            replace_text(path, json.dumps(function(), indent=1) + "\n")
            print(f"{name}: {time.perf_counter() - start:,.0f} s", file=sys.stderr, flush=True)
        return json.loads(path.read_text())

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


class Comparison(Experiments, abc.ABC):
    """Models that are trained with several seeds, and a row of figures for each run.

    A row is a committed JSON file, MODEL-SEED.json; a run that has one is neither trained nor
    measured again.

    Attributes:
        needs: a key that rows of earlier versions lack; these are made again.
    """

    needs: str

    def __init__(self, options: argparse.Namespace) -> None:
        super().__init__(options.workdir.absolute(), options.rows.absolute(), options.jobs)
        self.options = options

    @abc.abstractmethod
    def settings(self, model: str) -> Result:
        """What the rows of a model are made with, which a stored row must agree with."""

    @abc.abstractmethod
    def measure(self, model: str, seed: int) -> Result:
        """Trains a model, and returns what follows the settings in its row."""

    def run(self, models: Iterable[str]) -> Rows:
        """Trains and measures what is missing; returns all rows of the folder.

        Raises:
            SystemExit: a command fails, or a row was made with other settings.
        """
        self.all(self.row, [(model, seed) for seed in self.options.seeds for model in models])
        return read_rows(self.results)

    def row(self, model: str, seed: int) -> Result:
        name, settings = f"{model}-{seed}", self.settings(model)

        def make() -> Result:
            return {"model": model, "seed": seed, **settings, **self.measure(model, seed)}

        row = self.once(name, make, needs=self.needs)
        if different := [key for key in settings if row[key] != settings[key]]:
            path = self.results / f"{name}.json"
            raise SystemExit(f"{path}: made with other {', '.join(different)}; use other --rows")
        return row

    def train(self, config: TrainConfig, workdir: Path, seed: int, *options: Any) -> None:
        """Trains a model, or resumes its training."""
        recipe = workdir.with_suffix(".json")
        replace_text(recipe, to_json(config))
        self.vmoe("train", "--config", recipe, "--workdir", workdir, "--seed", seed, *options)


def read_rows(folder: Path) -> Rows:
    """The rows of an experiment, by model and seed."""
    rows: dict[str, dict[int, Result]] = {}
    for path in sorted(folder.glob("*.json")):
        row = json.loads(path.read_text())
        rows.setdefault(row["model"], {})[row["seed"]] = row
    return rows


def argument_parser(
    description: str, name: str, models: Collection[str]
) -> argparse.ArgumentParser:
    """A parser with the options of a ``Comparison``.

    Args:
        name: the name of the folders of runs and rows.
        models: the names of all models.
    """
    parser = argparse.ArgumentParser(description=description)
    parser.add_argument("--workdir", type=Path, default=ROOT / "runs" / name)
    parser.add_argument("--rows", type=Path, default=ROWS / name, help="folder of JSON files")
    parser.add_argument("--jobs", type=int, default=2, help="commands at a time")
    parser.add_argument("--seeds", type=int, nargs="+", default=SEEDS)
    parser.add_argument("--only", nargs="+", default=list(models), choices=models, help="models")
    return parser


def versions(workdir: Path) -> Result:
    """The versions and the machine of a run."""
    environment = read_environment(workdir)
    return {name: environment[name] for name in VERSIONS}


def jax_versions(rows: Rows) -> str:
    every = {f"jax {row['versions']['jax']}" for of in rows.values() for row in of.values()}
    return ", ".join(sorted(every))


def percents(values: Iterable[float]) -> tuple[str, str]:
    """Percentages, one for each seed, and their mean."""
    values = list(values)
    return ", ".join(f"{value:.2f}" for value in values), f"{np.mean(values):.2f}"


def markdown_table(columns: Sequence[str], lines: Iterable[Sequence[str]]) -> str:
    every = [columns, ["---"] * len(columns), *lines]
    return "\n".join(f"| {' | '.join(line)} |" for line in every)


def write_sections(page: Path, sections: Mapping[str, str]) -> None:
    """Replaces the text between the markers of each named section of a page.

    Raises:
        SystemExit: the page has no such markers.
    """
    text = page.read_text()
    for name, section in sections.items():
        begin, end = (f"<!-- {name}: {word} -->" for word in ("begin", "end"))
        if not re.search(f"{begin}.*{end}", text, re.DOTALL):
            raise SystemExit(f"{page}: no section from {begin} to {end}")
        before, after = text.partition(begin)[0], text.partition(end)[2]
        text = f"{before}{begin}\n\n{section.strip()}\n\n{end}{after}"
    replace_text(page, text)
