"""What a run tells while it works: a live line, CSV files and TensorBoard events."""

import contextlib
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any

import jax
import numpy as np
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Column

from vmoe import distributed
from vmoe.config import TrainConfig
from vmoe.errors import Failure
from vmoe.evaluate import Evaluation
from vmoe.train.writers import CsvWriter, TensorBoardWriter, _flat

FIRST = ("loss", "accuracy", "aux_loss", "dropped", "lr", "gradient_norm")  # in metrics.csv


FIGURES = (  # of an evaluation, as they stand in evaluations.csv
    *("images", "accuracy", "top5_accuracy", "cross_entropy", "brier"),
    *("calibration_error", "dropped", "images_per_second"),
)


def report_of(workdir: Path, config: TrainConfig) -> "Report | NullReport":
    """The report of a run, whose first process alone tells and writes."""
    return Report(workdir, config) if distributed.is_primary() else NullReport()


class NullReport(contextlib.nullcontext):
    """What the other processes report: nothing."""

    def nothing(self, *words: Any) -> None:
        """In the place of each method of a Report."""

    goes_on = step = metrics = evaluations = say = nothing

    def evaluated(self, step: int) -> bool:
        """The first process knows."""
        return False

    def aside(self, doing: str) -> contextlib.AbstractContextManager[None]:
        """What is done inside."""
        return contextlib.nullcontext()

    def __enter__(self) -> "NullReport":
        return self


class Report:
    """CsvWriter of metrics for the reader at the terminal and for the files; a context manager.

    On a terminal one live line; elsewhere a plain line for each row.
    """

    def __init__(self, workdir: Path, config: TrainConfig):
        self._workdir = workdir
        self._config = config
        self._metrics = CsvWriter(workdir / "metrics.csv")
        self._evaluations = CsvWriter(workdir / "evaluations.csv")
        self._experts = CsvWriter(workdir / "experts.csv")
        self._console = Console(stderr=True, markup=False)
        self._progress = Progress(
            MofNCompleteColumn(table_column=Column(min_width=2 * len(str(config.steps)) + 1)),
            *([BarColumn(bar_width=20)] if self._console.width >= 120 else []),
            TimeRemainingColumn(compact=True, table_column=Column(min_width=len("00:00"))),
            TextColumn("left", table_column=Column(min_width=len("left"))),
            TextColumn(
                "{task.description}",
                markup=False,
                table_column=Column(ratio=1, no_wrap=True, overflow="ellipsis"),
            ),
            console=self._console,
            expand=True,
            disable=not self._console.is_terminal,
        )
        self._task = self._progress.add_task("", total=config.steps)
        self._events = TensorBoardWriter(workdir / "tensorboard")
        self._last, self._first = (0, time.perf_counter()), 1

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
        with contextlib.suppress(*([Failure] if kind else [])):  # what went wrong first is told
            self._events.close()

    def goes_on(self, step: int) -> None:
        """CsvWriter after a step are forgotten, so that none stands twice once it is taken again."""
        for rows in (self._metrics, self._evaluations, self._experts):
            rows.forget_after(step)
        self._events.forget_after(step)
        self._last, self._first = (step, time.perf_counter()), step + 1
        self._progress.reset(self._task, completed=step)
        if step:
            self.say(f"{self._workdir}: goes on after step {step} of {self._config.steps}")

    def evaluated(self, step: int) -> bool:
        """Whether the evaluations of a step are written."""
        return self._evaluations.last_step == step

    def step(self, step: int) -> None:
        """A step was taken (perhaps not finished: nothing waits for the device)."""
        if step == self._first and self._config.log_every > 1:
            self._last = step, time.perf_counter()  # it was compiled, which is not in images/s
        self._progress.update(self._task, completed=step)

    @contextlib.contextmanager
    def aside(self, doing: str) -> Iterator[None]:
        """What is done inside, while the device rests, is not in images/s."""
        shown = self._progress.tasks[self._task].description
        self._progress.update(self._task, description=doing)
        start = time.perf_counter()
        yield
        self._progress.update(self._task, description=shown)
        before, then = self._last
        self._last = before, then + time.perf_counter() - start

    def metrics(self, step: int, metrics: dict[str, Any]) -> None:
        """A row of what a step measured, which waits for the device."""
        found = jax.device_get(metrics)
        blocks: dict[int, dict[str, np.ndarray]] = found.pop("blocks")
        for name in ("finite", "stop"):
            found.pop(name)
        before, then = self._last
        self._last = step, time.perf_counter()
        rate = (step - before) * self._config.batch_size / (self._last[1] - then)
        row = {name: float(found.pop(name)) for name in FIRST} | {"images_per_second": rate}
        experts = []
        for block, measures in blocks.items():
            load, importance = measures.pop("load"), measures.pop("importance")
            row |= _flat({f"block{block}": measures})
            experts += [
                {"block": block, "expert": e, "load": load[e], "importance": importance[e]}
                for e in range(len(load))
            ]
        row |= _flat(found)
        self._metrics.append(step, [row])
        self._experts.append(step, experts)
        self._events.write(
            step,
            {name if "/" in name else f"train/{name}": value for name, value in row.items()}
            | {
                f"block{expert['block']}/{name}/{expert['expert']}": expert[name]
                for expert in experts
                for name in ("load", "importance")
            },
        )
        self._tell(
            step,
            f"loss {row['loss']:.3f}",
            f"accuracy {row['accuracy']:.1%}",
            f"lr {row['lr']:.1e}",
            f"dropped {row['dropped']:.1%}",
            f"{rate:,.0f} images/s",
        )

    def evaluations(self, step: int, found: Sequence[tuple[str, str, Evaluation]]) -> None:
        """A row for each evaluation of a step: the set's name, whose weights, what came out."""
        rows = []
        for name, weights, evaluation in found:
            figures = {figure: getattr(evaluation, figure) for figure in FIGURES}
            rows.append({"set": name, "weights": weights} | figures)
            self._events.write(step, {f"{name}_{weights}/{k}": v for k, v in figures.items()})
            self._tell(
                step,
                f"{name}{' (average)' if weights == 'ema' else ''} {evaluation.accuracy:.2%}",
                f"cross-entropy {evaluation.cross_entropy:.3f}",
                f"dropped {evaluation.dropped:.1%}",
                stays=True,
            )
        self._evaluations.append(step, rows)

    def say(self, text: str) -> None:
        """A line that stays."""
        self._console.print(text, highlight=False, soft_wrap=True)

    def _tell(self, step: int, *parts: str, stays: bool = False) -> None:
        line = "  ".join(parts)
        if not stays:  # in words short enough for 80 columns
            short = " ".join(parts).replace("accuracy", "acc").replace("images/s", "img/s")
            self._progress.update(self._task, description=short)
        if stays or not self._console.is_terminal:
            self.say(f"step {step}/{self._config.steps}  {line}")
