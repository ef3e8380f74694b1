"""Progress and metrics of a run: a live line, CSV files and TensorBoard events."""

import contextlib
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Column

from vmoe import distributed
from vmoe.analysis.health import findings
from vmoe.config import TrainConfig
from vmoe.errors import Failure, one_line
from vmoe.evaluate import NamedEvaluation
from vmoe.train.writers import START, CsvWriter, Position, TensorBoardWriter, flatten
from vmoe.workdir.layout import TABLES

LEADING = ("loss", "accuracy", "aux_loss", "dropped", "unprocessed", "lr", "gradient_norm")
"""The first columns of metrics.csv."""
EVALUATION = (  # columns of evaluations.csv
    *("images", "accuracy", "top5_accuracy", "cross_entropy", "brier"),
    *("calibration_error", "dropped", "unprocessed", "images_per_second"),
)


def make_report(workdir: Path, config: TrainConfig) -> "Report | NullReport":
    """The report of a run: only the primary process prints and writes."""
    return Report(workdir, config) if distributed.is_primary() else NullReport()


class NullReport(contextlib.nullcontext):
    """The report of the other processes: the methods of a Report, which do nothing here."""

    def ignore(self, *arguments: Any) -> None:
        """Does nothing; replaces the methods that print and write."""

    step = metrics = evaluations = log = resume = ignore

    def positions(self) -> dict[str, Position]:
        """Empty; only the primary process writes the files."""
        return {}

    def evaluated(self, step: int) -> bool:
        """False; only the primary process reads the files."""
        return False

    def warn(self, text: str) -> None:
        """Prints a line that only this process knows."""
        print(f"process {jax.process_index()}: {one_line(text)}", file=sys.stderr)

    def pause_timer(self, activity: str) -> contextlib.AbstractContextManager[None]:
        """A context that does nothing."""
        return contextlib.nullcontext()

    def __enter__(self) -> "NullReport":
        return self


class Report:
    """Rows of metrics for the terminal and for the files; a context manager.

    A terminal shows one live line; elsewhere each row is a plain line.
    """

    def __init__(self, workdir: Path, config: TrainConfig):
        self._workdir, self._config = workdir, config
        self._tables = [CsvWriter(workdir / name) for name in TABLES]
        self._metrics, self._evaluations, self._experts = self._tables
        self._events = TensorBoardWriter(workdir / "tensorboard")
        # In Jupyter, rich would show each line as an output of its own; plain lines go to stderr.
        self._console = Console(
            stderr=True, markup=False, force_jupyter=False, force_terminal=sys.stderr.isatty()
        )
        self._progress = _progress(self._console, config.steps)
        self._task = self._progress.add_task("", total=config.steps)
        self._timed_from = 0, time.perf_counter()  # step, and when it ended
        self._first = 1  # the step that compiles
        self._found: set[tuple[str, str, int | None]] = set()  # at the last evaluations

    def __enter__(self) -> "Report":
        self._progress.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, *exception: object) -> None:
        self._progress.stop()
        with contextlib.suppress(*([Failure] if kind else [])):  # the first error is reported
            self._events.close()

    def positions(self) -> dict[str, Position]:
        """The end of each CSV file by name, to be saved with a checkpoint."""
        return {table.name: table.position() for table in self._tables}

    def resume(self, step: int, positions: dict[str, Position]) -> None:
        """Continues after a step; removes the rows of later steps, which will be run again.

        Args:
            positions: as saved with the checkpoint of the step; empty if there is none.

        Raises:
            Failure: a CSV file is corrupt, and all are left as they are; or one cannot be written.
        """
        last = 0 if positions else self._metrics.stored_step()
        if last > 2 * self._config.checkpoint_every:  # a kill may lose the first checkpoint
            raise Failure(
                f"{self._workdir}: metrics.csv has rows up to step {last}, but there is no "
                "checkpoint: restore them, or use another workdir"
            )
        missing = [table.restore(step, positions.get(table.name, START)) for table in self._tables]
        for table in self._tables:
            table.truncate()
        self._events.truncate_after(step)
        self._timed_from, self._first = (step, time.perf_counter()), step + 1
        self._progress.reset(self._task, completed=step)
        for message in filter(None, missing):
            self.log(f"{message}; starting a new file")
        if step == self._config.steps:
            self.log(f"{self._workdir}: already complete ({step} of {step} steps)")
        elif step:
            self.log(f"{self._workdir}: resumed from step {step} of {self._config.steps}")

    def evaluated(self, step: int) -> bool:
        """Whether the evaluations of a step are written."""
        return self._evaluations.last_step == step

    def step(self, step: int) -> None:
        """Shows that a step was dispatched; does not wait for the device."""
        if step == self._first:
            self._timed_from = step, time.perf_counter()  # leaves compiling out of images/s
        self._progress.update(self._task, completed=step)

    @contextlib.contextmanager
    def pause_timer(self, activity: str) -> Iterator[None]:
        """Leaves the time inside the context out of images/s, and shows the activity."""
        description = self._progress.tasks[self._task].description
        self._progress.update(self._task, description=activity)
        start = time.perf_counter()
        yield
        self._progress.update(self._task, description=description)
        step, since = self._timed_from
        self._timed_from = step, since + time.perf_counter() - start

    def metrics(self, step: int, metrics: dict[str, Any]) -> None:
        """Reports the metrics of a step; waits for the device."""
        values = jax.device_get(metrics)
        blocks: dict[int, dict[str, np.ndarray]] = values.pop("blocks")
        (before, since), now = self._timed_from, time.perf_counter()
        self._timed_from = step, now
        # unknown after the first step of a process, which compiles
        speed = (step - before) * self._config.batch_size / (now - since) if step > before else None
        row = {name: float(values.pop(name)) for name in LEADING} | {"images_per_second": speed}
        if not self._config.model.can_drop:
            row["dropped"] = None
        experts = []
        for block, measures in blocks.items():
            load, importance = measures.pop("load"), measures.pop("importance")
            if not self._config.model.moe_blocks[block].router.can_drop:
                del measures["dropped"]
            row |= flatten({f"block{block}": measures})
            experts += [
                {"block": block, "expert": e, "load": load[e], "importance": importance[e]}
                for e in range(len(load))
            ]
        row |= flatten(values)
        self._metrics.append(step, [row])
        self._experts.append(step, experts)
        self._events.write(
            step,
            {
                name if "/" in name else f"train/{name}": value
                for name, value in row.items()
                if value is not None
            }
            | {
                f"block{expert['block']}/{name}/{expert['expert']}": expert[name]
                for expert in experts
                for name in ("load", "importance")
            },
        )
        self._show(
            step,
            f"loss {row['loss']:.3f}",
            f"accuracy {row['accuracy']:.1%}",
            f"lr {row['lr']:.1e}",
            *self._drops(row),
            *([] if speed is None else [f"{speed:,.0f} images/s"]),
        )

    def evaluations(self, step: int, evaluations: Sequence[NamedEvaluation]) -> None:
        """Reports the evaluations of a step, and what is newly wrong with the routing."""
        found: dict[tuple[str, str, int | None], str] = {}
        rows: list[dict[str, Any]] = []
        for name, weights, result in evaluations:
            metrics = {metric: getattr(result, metric) for metric in EVALUATION}
            rows.append({"set": name, "weights": weights} | metrics)
            known = {k: v for k, v in metrics.items() if v is not None}
            self._events.write(step, {f"{name}_{weights}/{k}": v for k, v in known.items()})
            self._show(
                step,
                f"{name}{' (EMA)' if weights == 'ema' else ''} {result.accuracy:.2%}",
                f"cross-entropy {result.cross_entropy:.3f}",
                *self._drops(metrics),
                permanent=True,
            )
            for each in findings(result.totals):
                found.setdefault((name, each.kind, each.block), f"{name}: {each}")
        for key, text in found.items():
            if key not in self._found:
                self.log(text)
        self._found = set(found)
        self._evaluations.append(step, rows)

    def log(self, text: str) -> None:
        """Prints a permanent line."""
        self._console.print(one_line(text), highlight=False, soft_wrap=True)

    warn = log

    def _drops(self, row: dict[str, Any]) -> list[str]:
        """Text for the console: drops where tokens choose, else tokens without an expert."""
        if not self._config.model.sparse_blocks:
            return []
        if self._config.model.can_drop:
            return [f"dropped {row['dropped']:.1%}"]
        return [f"unprocessed {row['unprocessed']:.1%}"]

    def _show(self, step: int, *parts: str, permanent: bool = False) -> None:
        line = "  ".join(parts)
        if not permanent:  # short words, so that it fits 80 columns
            short = " ".join(parts).replace("accuracy", "acc").replace("images/s", "img/s")
            self._progress.update(self._task, description=short)
        if permanent or not self._console.is_terminal:
            self.log(f"step {step}/{self._config.steps}  {line}")


def _progress(console: Console, steps: int) -> Progress:
    """The live line: step, time left and the latest metrics; a bar if there is room."""
    return Progress(
        MofNCompleteColumn(table_column=Column(min_width=2 * len(str(steps)) + 1)),
        *([BarColumn(bar_width=20)] if console.width >= 120 else []),
        TimeRemainingColumn(compact=True, table_column=Column(min_width=len("00:00"))),
        TextColumn("left", table_column=Column(min_width=len("left"))),
        TextColumn(
            "{task.description}",
            markup=False,
            table_column=Column(ratio=1, no_wrap=True, overflow="ellipsis"),
        ),
        console=console,
        expand=True,
        disable=not console.is_terminal,
    )
