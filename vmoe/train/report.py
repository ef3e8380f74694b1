"""The reports of a run, which are passed to a list of sinks."""

import contextlib
import dataclasses
import json
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import jax

from vmoe import distributed
from vmoe.config import TrainConfig
from vmoe.costs.chips import chip_of
from vmoe.costs.flops import training_flops
from vmoe.errors import one_line, parse_json
from vmoe.evaluate import NamedEvaluation
from vmoe.evaluate.table import remarks
from vmoe.health import findings
from vmoe.host.retry import read_regular, retried
from vmoe.train.console import RunConsole
from vmoe.train.entries import evaluation_entry, training_entry
from vmoe.train.sinks import START, CsvFile, Entry, Position, Sink, TensorBoard, write_errors
from vmoe.train.timing import Activity, StepTimer
from vmoe.train.wandb_run import WandbRun
from vmoe.workdir.layout import EVALUATED, TABLES, replace_text


class Report:
    """Passes the reports of a run to its sinks; a context manager.

    Only the primary process has sinks; the others print only warnings, and write nothing.

    Args:
        devices: number of devices that the run uses.
        images: number of training images, for the number of the epoch.
        wandb: the project of Weights & Biases, or empty; None to not log there; see ``WandbRun``.
        sinks: the caller's own sinks.
    """

    def __init__(
        self,
        workdir: Path,
        config: TrainConfig,
        *,
        devices: int = 1,
        images: int | None = None,
        wandb: str | None = None,
        sinks: Sequence[Sink] = (),
    ):
        self._workdir, self._config = workdir, config
        self._record = workdir / EVALUATED
        self._timer = StepTimer(config.batch_size)
        self._tables: dict[str, CsvFile] = {}
        self._sinks: list[Sink] = []
        if distributed.is_primary():
            self._timer = _timer(config, devices)
            self._tables = {name: CsvFile(workdir / name) for name in TABLES}
            epoch = None if images is None else config.batch_size / images  # of a step
            console = RunConsole(config.total_steps, workdir, epoch)
            others = [*sinks]
            if wandb is not None:
                others.append(WandbRun(workdir, config, wandb, console.log))
            events = TensorBoard(workdir / "tensorboard")
            # CSV files come after W&B and TensorBoard, because a step whose rows they have is not
            # reported again. Sinks are closed in reverse, so that W&B prints after the live line.
            self._sinks = [*others, events, *self._tables.values(), console]
        self._open = contextlib.ExitStack()
        self._first = 1  # the step that compiles
        self._compiled = set[str]()
        self._found: set[tuple[str, str, int | None]] = set()  # findings of the last evaluations

    def __enter__(self) -> "Report":
        for sink in self._sinks:
            self._open.enter_context(sink)
        return self

    def __exit__(self, *exception: Any) -> None:
        self._open.__exit__(*exception)

    def positions(self) -> dict[str, Position]:
        """The end of each CSV file by name, to be saved with a checkpoint."""
        return {name: table.position() for name, table in self._tables.items()}

    def resume(self, step: int, positions: dict[str, Position]) -> None:
        """Continues after a step; removes the rows of later steps, which will be run again.

        A checkpoint is saved before the evaluation of its step, whose rows are kept if all of them
        were written and have not changed since; else the evaluation is repeated.

        Args:
            positions: as saved with the checkpoint of the step; empty if there is none.

        Raises:
            Failure: a CSV file is corrupt, and no file is changed; or a file cannot be written.
        """
        tables = self._tables.values()
        kept = [] if positions else list(filter(None, [table.set_aside() for table in tables]))
        if kept:
            self.log(
                f"{self._workdir}: there is no checkpoint, so the run starts again; its rows are "
                f"kept in {', '.join(kept)}"
            )
        evaluated = self._evaluated(step)
        if evaluated and all(each.has(evaluated[name]) for name, each in self._tables.items()):
            positions = evaluated
        missing = [
            each.restore(step, positions.get(name, START)) for name, each in self._tables.items()
        ]
        for sink in self._sinks:
            sink.resume(step)
        self._first = step + 1
        self._timer.restart(step)
        for message in filter(None, missing):
            self.log(f"{message}; starting a new file")
        if step == self._config.steps:
            self.log(f"{self._workdir}: already complete ({step} of {step} steps)")
        elif step:
            self.log(f"{self._workdir}: resumed from step {step} of {self._config.steps}")

    def _evaluated(self, step: int) -> dict[str, Position]:
        """The end of each CSV file after the evaluation of a step.

        Empty if it is not recorded, or was without one of the sets.
        """
        try:
            stored = parse_json(retried(self._record, lambda: read_regular(self._record)))
            if stored["step"] == step and {*self._sets()} <= {*stored["sets"]}:
                return {name: Position(*stored["files"][name]) for name in self._tables}
        except (OSError, ValueError, LookupError, TypeError):
            pass  # missing or corrupt: nothing is trusted, and the evaluation is repeated
        return {}

    def _sets(self) -> list[str]:
        """The names of the evaluation sets and the few-shot sets."""
        sets = [each.name for each in self._config.evaluations]
        return sets + [f"few-shot {name}" for name in self._config.fewshot.data]

    def has(self, table: str, step: int) -> bool:
        """Whether a CSV file has the rows of a step; False in all but the primary process."""
        return table in self._tables and self._tables[table].last_step == step

    def step(self, step: int) -> None:
        """Shows that a step was dispatched; does not wait for the device."""
        if step == self._first:
            self._timer.restart(step)  # leaves compiling out of the times
        for sink in self._sinks:
            sink.step(step)

    def measure(self, activity: Activity) -> contextlib.AbstractContextManager[None]:
        """Counts the time inside the context for an activity; see ``StepTimer``."""
        return self._timer.measure(activity)

    @contextlib.contextmanager
    def pause_timer(self, activity: str, *, compiles: bool = False) -> Iterator[None]:
        """Leaves the time inside the context out of the steps' time, and shows the activity.

        Args:
            compiles: whether it compiles programs when it is done for the first time.
        """
        first = compiles and activity not in self._compiled
        self._compiled.add(activity)
        with self.measure("pause"), self.showing(activity + " (compiling first)" * first):
            yield

    @contextlib.contextmanager
    def showing(self, activity: str) -> Iterator[None]:
        """Shows what is done inside the context other than steps."""
        for sink in self._sinks:
            sink.activity(activity)
        yield
        for sink in self._sinks:
            sink.activity("")

    def metrics(self, step: int, metrics: dict[str, Any]) -> None:
        """Reports the metrics of a step; waits for the device."""
        if self._sinks:
            values, timing = jax.device_get(metrics), self._timer.row(step)
            with self.measure("reporting"):
                self.write(step, training_entry(values, timing, self._config.model))

    def evaluations(self, step: int, evaluations: Sequence[NamedEvaluation]) -> None:
        """Reports the evaluations of a step, and new problems of the routing.

        During the warmup the only problem is a value that is not finite: routers have hardly
        learned, so the loads of experts say nothing yet.
        """
        model, last = self._config.model, step == self._config.total_steps
        warmup = step <= self._config.optim.warmup_steps and not last
        sizes = {each.name: each.batch_size for each in self._config.evaluations}
        self.write(step, *(evaluation_entry(each, model, sizes[each.set]) for each in evaluations))
        if self._tables:
            with write_errors(self._record):
                record = {"step": step, "sets": self._sets(), "files": self.positions()}
                replace_text(self._record, json.dumps(record))
        found: dict[tuple[str, str, int | None], str] = {}
        for name, _, result in evaluations:
            for each in findings(model, result.totals, training=not last):
                if each.kind == "not_finite" or not warmup:
                    found.setdefault((name, each.kind, each.block), f"{name}: {each}")
        for key, text in found.items():
            if key not in self._found:
                self.log(text)
        self._found = set(found)
        if last:
            for name, weights, result in evaluations:
                for text in remarks(result):
                    self.log(f"{name}{' (moving average)' * (weights == 'ema')}: {text}")

    @contextlib.contextmanager
    def compiling(self, what: str) -> Iterator[None]:
        """Says that a program is compiled, which can take minutes, and how long it took; once."""
        new, start = what not in self._compiled, time.perf_counter()
        self._compiled.add(what)
        if new:
            self.log(f"compiling {what}")
        yield
        if new:
            self.log(f"compiled {what} in {time.perf_counter() - start:.1f} s")

    def write(self, step: int, *entries: Entry) -> None:
        """Passes the entries of a step to every sink."""
        for sink in self._sinks:
            sink.write(step, entries)

    def log(self, text: str) -> None:
        """Prints a permanent line."""
        for sink in self._sinks:
            sink.log(text)

    def warn(self, text: str) -> None:
        """Prints a line about this process only."""
        if self._sinks:
            self.log(text)
        else:
            print(f"process {jax.process_index()}: {one_line(text)}", file=sys.stderr)


def _timer(config: TrainConfig, devices: int) -> StepTimer:
    """The timer of a run; the FLOPs are unknown if a part of the model is frozen."""
    frozen = 0 in dataclasses.astuple(config.optim.lr_factors)
    chip = chip_of(jax.devices()[0].device_kind)
    return StepTimer(
        config.batch_size,
        flops_per_image=None if frozen else training_flops(config.model),
        peak_flops=None if chip is None else devices * chip.peak_flops,
    )
