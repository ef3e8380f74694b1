"""What a run tells while it works: a live line, CSV files and TensorBoard events."""

import contextlib
import csv
import io
import os
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
from tensorboardX.event_file_writer import EventsWriter
from tensorboardX.proto.event_pb2 import Event, SessionLog
from tensorboardX.summary import scalar

from vmoe import processes
from vmoe.config import Train
from vmoe.errors import Failure
from vmoe.evaluate import Evaluation

FIRST = ("loss", "accuracy", "balance", "dropped", "lr", "gradient_norm")  # in metrics.csv
FIGURES = (  # of an evaluation, as they stand in evaluations.csv
    *("images", "accuracy", "top5_accuracy", "cross_entropy", "brier"),
    *("calibration_error", "dropped", "images_per_second"),
)
Row = dict[str, Any]


def report_of(workdir: Path, config: Train) -> "Report | Silence":
    """The report of a run, whose first process alone tells and writes."""
    return Report(workdir, config) if processes.first() else Silence()


class Silence(contextlib.nullcontext):
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

    def __enter__(self) -> "Silence":
        return self


class Report:
    """Rows of metrics for the reader at the terminal and for the files; a context manager.

    On a terminal one live line; elsewhere a plain line for each row.
    """

    def __init__(self, workdir: Path, config: Train):
        self._workdir = workdir
        self._config = config
        self._metrics = Rows(workdir / "metrics.csv")
        self._evaluations = Rows(workdir / "evaluations.csv")
        self._experts = Rows(workdir / "experts.csv")
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
        self._events = Events(workdir / "tensorboard")
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
        """Rows after a step are forgotten, so that none stands twice once it is taken again."""
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


class Rows:
    """A CSV file whose first column is the step; its header is that of the first row."""

    def __init__(self, path: Path):
        self._path = path
        self._columns: list[str] = []
        self.last_step: int | None = None

    def append(self, step: int, rows: Sequence[Row]) -> None:
        """Writes rows of one step, all at once."""
        if not rows:
            return
        columns = ["step", *rows[0]]
        if self._columns and self._columns != columns:
            raise Failure(f"{self._path} has other columns: another version of vmoe made it")
        text = io.StringIO()
        writer = csv.DictWriter(text, columns)
        if not self._columns:
            writer.writeheader()
        writer.writerows({"step": step} | {k: _text(v) for k, v in r.items()} for r in rows)
        with _told(self._path), self._path.open("a", newline="") as file:
            file.write(text.getvalue())
        self._columns, self.last_step = columns, step

    def forget_after(self, step: int) -> None:
        """Keeps whole rows up to a step."""
        rows: list[dict[str, str]] = []
        if self._path.exists():
            try:
                with self._path.open(newline="") as file:
                    reader = csv.DictReader(file)
                    whole = (row for row in reader if None not in row.values() and None not in row)
                    rows = [row for row in whole if int(row["step"]) <= step]
            except (ValueError, KeyError, csv.Error) as error:
                raise Failure(
                    f"{self._path} is damaged ({error}): repair it or move it away, then the same "
                    "line goes on"
                ) from None
        self._columns = list(rows[0]) if rows else []
        self.last_step = int(rows[-1]["step"]) if rows else None
        beside = self._path.with_suffix(".tmp")
        with _told(self._path), beside.open("w", newline="") as file:
            writer = csv.DictWriter(file, self._columns)
            if rows:
                writer.writeheader()
            writer.writerows(rows)
        os.replace(beside, self._path)


class Events:
    """TensorBoard's events, written at once: its own writer has a thread that fails unheard."""

    def __init__(self, folder: Path):
        self._folder = folder
        self._writer: EventsWriter | None = None

    def forget_after(self, step: int) -> None:
        """A new file, at which TensorBoard forgets what others hold of later steps."""
        self.close()
        with _told(self._folder):
            self._folder.mkdir(exist_ok=True)
            # Its own names have whole seconds: a second file of one second would replace it.
            self._writer = EventsWriter(str(self._folder / "events"), f".{time.time_ns()}")
            start = SessionLog(status=SessionLog.START)
            self._writer.write_event(Event(step=step + 1, session_log=start))
            self._writer.flush()

    def write(self, step: int, values: dict[str, Any]) -> None:
        """Scalars of one step, by tag."""
        now = time.time()
        with _told(self._folder):
            for tag, value in values.items():
                event = Event(step=step, wall_time=now, summary=scalar(tag, value))
                self._writer.write_event(event)
            self._writer.flush()

    def close(self) -> None:
        """What is written is written; the next write needs ``forget_after`` first."""
        with _told(self._folder):
            if self._writer:
                self._writer.close()


@contextlib.contextmanager
def _told(path: Path) -> Iterator[None]:
    """What the system says against writing, as one line that names the place."""
    try:
        yield
    except OSError as error:
        raise Failure(
            f"{path} cannot be written ({error.strerror}); make room, then the same line goes on "
            "from its newest checkpoint"
        ) from error


def _flat(tree: dict[str, Any], prefix: str = "") -> dict[str, float]:
    """Nested measures as columns, named by their path: norms/gradients/head."""
    row = {}
    for name, value in tree.items():
        if isinstance(value, dict):
            row |= _flat(value, f"{prefix}{name}/")
        else:
            row[f"{prefix}{name}"] = float(value)
    return row


def _text(value: Any) -> str:
    return f"{value:.6g}" if isinstance(value, float | np.floating) else str(value)
