"""What a run tells while it works: a live line, and ``metrics.csv``."""

import contextlib
import csv
import os
import time
from collections.abc import Iterator
from pathlib import Path
from types import TracebackType
from typing import Any

import jax
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from vmoe.config import Train

COLUMNS = (
    "step",
    "loss",
    "accuracy",
    "balance",
    "dropped",
    "lr",
    "gradient_norm",
    "images_per_second",
    "validation_accuracy",
    "validation_cross_entropy",
    "validation_dropped",
)


class Report:
    """Rows of metrics for the reader at the terminal and for the file; a context manager.

    On a terminal one live line; elsewhere a plain line for each row.
    """

    def __init__(self, workdir: Path, config: Train, *, start: int):
        self._file = workdir / "metrics.csv"
        self._batch_size = config.batch_size
        self._steps = config.steps
        self._console = Console(stderr=True)
        self._last = (start, time.perf_counter())
        self._progress = Progress(
            TextColumn("step"),
            MofNCompleteColumn(),
            BarColumn(bar_width=20),
            TextColumn("{task.description}"),
            TimeRemainingColumn(compact=True),
            TextColumn("left"),
            console=self._console,
            disable=not self._console.is_terminal,
        )
        self._task = self._progress.add_task("", total=config.steps, completed=start)
        self._forget_after(start)
        if start:
            self.say(f"{workdir}: goes on after step {start} of {config.steps}")

    def __enter__(self) -> "Report":
        self._progress.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._progress.stop()

    def step(self, step: int) -> None:
        """A step was taken (perhaps not finished: nothing waits for the device)."""
        self._progress.update(self._task, completed=step)

    @contextlib.contextmanager
    def aside(self, metrics: dict[str, jax.Array]) -> Iterator[None]:
        """What is done inside, once the step of the metrics is finished, is not in images/s."""
        jax.block_until_ready(metrics)
        start = time.perf_counter()
        yield
        before, then = self._last
        self._last = before, then + time.perf_counter() - start

    def metrics(self, step: int, metrics: dict[str, jax.Array], **more: float) -> None:
        """A row: what the step measured, which waits for the device, and what else there is."""
        row = {name: float(value) for name, value in jax.device_get(metrics).items()} | more
        before, then = self._last
        self._last = step, time.perf_counter()
        row["images_per_second"] = (step - before) * self._batch_size / (self._last[1] - then)
        with self._file.open("a", newline="") as file:
            csv.DictWriter(file, COLUMNS).writerow({"step": step} | _rounded(row))
        line = self._line(row)
        self._progress.update(self._task, description=line)
        if not self._console.is_terminal:
            self.say(f"step {step}/{self._steps}  {line}")

    def say(self, text: str) -> None:
        """A line that stays."""
        self._console.print(text, highlight=False, soft_wrap=True)

    def _line(self, row: dict[str, float]) -> str:
        parts = [
            f"loss {row['loss']:.3f}",
            f"accuracy {row['accuracy']:.1%}",
            f"lr {row['lr']:.1e}",
            f"dropped {row['dropped']:.1%}",
            f"{row['images_per_second']:,.0f} images/s",
        ]
        if "validation_accuracy" in row:
            parts.append(f"validation {row['validation_accuracy']:.2%}")
        return "  ".join(parts)

    def _forget_after(self, step: int) -> None:
        """Keeps the rows up to the step that goes on, so that none stands twice."""
        rows: list[dict[str, Any]] = []
        if self._file.exists():
            with self._file.open(newline="") as file:
                whole = (row for row in csv.DictReader(file) if None not in row.values())
                rows = [row for row in whole if int(row["step"]) <= step]
        beside = self._file.with_suffix(".tmp")
        with beside.open("w", newline="") as file:
            writer = csv.DictWriter(file, COLUMNS)
            writer.writeheader()
            writer.writerows(rows)
        os.replace(beside, self._file)


def _rounded(row: dict[str, float]) -> dict[str, str]:
    return {name: f"{value:.6g}" for name, value in row.items()}
