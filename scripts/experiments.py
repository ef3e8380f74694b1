"""Commands over a work folder, several at a time; finished steps are stored and not repeated."""

import json
import os
import queue
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from vmoe.workdir.layout import replace_text

ROOT = Path(__file__).parents[1]
Result = dict[str, Any]


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
        """The stored result of a name; else that of the function, which is stored.

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
