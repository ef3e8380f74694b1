"""The report of a run: its rows of metrics, in the terminal, CSV files, TensorBoard and W&B."""

import contextlib
import dataclasses
import sys
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jaxtyping import Float

from vmoe import distributed
from vmoe.analysis.health import findings
from vmoe.config import EvalConfig, TrainConfig
from vmoe.config.evaluation import Weights
from vmoe.costs.chips import chip_of
from vmoe.costs.flops import training_flops
from vmoe.data.sources import Source
from vmoe.errors import Failure, one_line
from vmoe.evaluate import NamedEvaluation
from vmoe.evaluate.fewshot import FewShotResult
from vmoe.train import rows
from vmoe.train.console import RunConsole
from vmoe.train.pictures import Tile, examples, sheet, worst_errors
from vmoe.train.timing import Activity, StepTimer
from vmoe.train.wandb_writer import WandbWriter
from vmoe.train.writers import START, CsvWriter, Position, TensorBoardWriter
from vmoe.workdir.layout import TABLES


def make_report(
    workdir: Path, config: TrainConfig, *, devices: int, wandb: str | None
) -> "Report | NullReport":
    """The report of a run: only the primary process prints and writes.

    Args:
        devices: number of devices that the run uses.
        wandb: the project of Weights & Biases, or empty; see ``WandbWriter``; None without it.

    Raises:
        Failure: W&B cannot be started.
    """
    if not distributed.is_primary():
        return NullReport()
    return Report(workdir, config, devices=devices, wandb=wandb)


class NullReport(contextlib.nullcontext):
    """The report of the other processes: the methods of a Report, which do nothing here."""

    def ignore(self, *arguments: Any, **named: Any) -> None:
        """Does nothing; replaces the methods that print and write."""

    step = metrics = examples = evaluations = worst_errors = fewshot = log = resume = ignore

    def positions(self) -> dict[str, Position]:
        """Empty; only the primary process writes the files."""
        return {}

    def evaluated(self, step: int) -> bool:
        """False; only the primary process reads the files."""
        return False

    probed = evaluated

    def warn(self, text: str) -> None:
        """Prints a line that only this process knows."""
        print(f"process {jax.process_index()}: {one_line(text)}", file=sys.stderr)

    def measure(self, activity: str) -> contextlib.AbstractContextManager[None]:
        """A context that does nothing."""
        return contextlib.nullcontext()

    pause_timer = measure

    def __enter__(self) -> "NullReport":
        return self


class Report:
    """Writes the rows of a run to the terminal and the files; a context manager.

    Args:
        devices: number of devices that the run uses.
        wandb: the project of Weights & Biases, or empty; None without it.
    """

    def __init__(
        self, workdir: Path, config: TrainConfig, *, devices: int = 1, wandb: str | None = None
    ):
        self._workdir, self._config = workdir, config
        self._console = RunConsole(config.total_steps, workdir)
        self._tables = [CsvWriter(workdir / name) for name in TABLES]
        self._metrics, self._evaluations, self._experts, self._fewshot = self._tables
        self._events = TensorBoardWriter(workdir / "tensorboard")
        self._sinks: list[TensorBoardWriter | WandbWriter] = [self._events]
        if wandb is not None:
            self._sinks.append(WandbWriter(workdir, config, wandb, self.log))
        self._open = contextlib.ExitStack()
        self._timer = _timer(config, devices)
        self._first = 1  # the step that compiles
        self._found: set[tuple[str, str, int | None]] = set()  # at the last evaluations

    def __enter__(self) -> "Report":
        for part in (*reversed(self._sinks), self._console):  # the console is closed first
            self._open.enter_context(part)
        return self

    def __exit__(self, *exception: Any) -> None:
        self._open.__exit__(*exception)

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
        if not positions:
            kept = list(filter(None, [table.set_aside() for table in self._tables]))
            if kept:
                self.log(
                    f"{self._workdir}: there is no checkpoint, so the run starts again; its rows "
                    f"are kept in {', '.join(kept)}"
                )
        missing = [table.restore(step, positions.get(table.name, START)) for table in self._tables]
        for table in self._tables:
            table.truncate()
        self._events.truncate_after(step)
        self._first = step + 1
        self._timer.restart(step)
        self._console.restart(step)
        for message in filter(None, missing):
            self.log(f"{message}; starting a new file")
        if step == self._config.steps:
            self.log(f"{self._workdir}: already complete ({step} of {step} steps)")
        elif step:
            self.log(f"{self._workdir}: resumed from step {step} of {self._config.steps}")

    def evaluated(self, step: int) -> bool:
        """Whether the evaluations of a step are written."""
        return self._evaluations.last_step == step

    def probed(self, step: int) -> bool:
        """Whether the few-shot probes of a step are written."""
        return self._fewshot.last_step == step

    def step(self, step: int) -> None:
        """Shows that a step was dispatched; does not wait for the device."""
        if step == self._first:
            self._timer.restart(step)  # leaves compiling out of the times
        self._console.step(step)

    def measure(self, activity: Activity) -> contextlib.AbstractContextManager[None]:
        """Counts the time inside the context as that of an activity; see ``StepTimer``."""
        return self._timer.measure(activity)

    @contextlib.contextmanager
    def pause_timer(self, activity: str) -> Iterator[None]:
        """Leaves the time inside the context out of that of the steps, and shows the activity."""
        with self.measure("pause"), self._console.activity(activity):
            yield

    def metrics(self, step: int, metrics: dict[str, Any]) -> None:
        """Reports the metrics of a step; waits for the device."""
        model, values = self._config.model, jax.device_get(metrics)
        timing = self._timer.row(step)
        with self.measure("reporting"):
            row, experts = rows.training_rows(values, timing, model)
            self._metrics.append(step, [row])
            self._experts.append(step, experts)
            self._write(step, rows.training_scalars(row, experts))
            self._console.show(step, *rows.training_texts(row, model))

    def examples(
        self,
        step: int,
        images: Float[np.ndarray, "b h w 3"],
        targets: Float[np.ndarray, "b y"],
        class_names: Sequence[str],
    ) -> None:
        """Shows the inputs of a step; see ``pictures.examples``."""
        self._write_picture(step, "train/examples", examples(images, targets, class_names))

    def evaluations(self, step: int, evaluations: Sequence[NamedEvaluation]) -> None:
        """Reports the evaluations of a step, and what is newly wrong with the routing."""
        found: dict[tuple[str, str, int | None], str] = {}
        table = list(map(rows.evaluation_row, evaluations))
        for row, (name, _, result) in zip(table, evaluations, strict=True):
            self._write(step, rows.evaluation_scalars(row))
            texts = rows.evaluation_texts(row, self._config.model)
            self._console.show(step, *texts, permanent=True)
            for each in findings(self._config.model, result.totals):
                found.setdefault((name, each.kind, each.block), f"{name}: {each}")
        for key, text in found.items():
            if key not in self._found:
                self.log(text)
        self._found = set(found)
        self._evaluations.append(step, table)

    def worst_errors(
        self,
        step: int,
        evaluations: Sequence[NamedEvaluation],
        sets: Sequence[tuple[EvalConfig, Source]],
        **reading: Any,
    ) -> None:
        """Shows the worst errors on each evaluation set; see ``pictures.worst_errors``.

        Args:
            evaluations: the last one of each set is shown, that of the moving average if there is
                one.
            sets: the evaluation sets.
            reading: arguments for ``evaluation_batches``.
        """
        last = {each.set: each for each in evaluations}
        for config, source in sets:
            name, weights, result = last[config.name]
            preprocessing = config.prepare(self._config.data, self._config.model)
            tiles = worst_errors(result, source, preprocessing, **reading)
            if tiles:
                self._write_picture(step, f"{name}_{weights}/worst_errors", tiles)

    def fewshot(self, step: int, weights: Weights, result: FewShotResult) -> None:
        """Reports the few-shot probes of a step."""
        table = rows.fewshot_rows(weights, result)
        self._fewshot.append(step, table)
        self._write(step, rows.fewshot_scalars(weights, result))
        self._console.show(step, *rows.fewshot_texts(weights, result), permanent=True)

    def log(self, text: str) -> None:
        """Prints a permanent line."""
        self._console.log(text)

    warn = log

    def _write(self, step: int, values: Mapping[str, Any]) -> None:
        for sink in self._sinks:
            sink.write(step, values)

    def _write_picture(self, step: int, tag: str, tiles: Sequence[Tile]) -> None:
        picture = sheet(tiles)
        for sink in self._sinks:
            sink.write_picture(step, tag, picture)


def _timer(config: TrainConfig, devices: int) -> StepTimer:
    """The FLOPs of a model of which a part is frozen are unknown."""
    frozen = 0 in dataclasses.astuple(config.optim.lr_factors)
    chip = chip_of(jax.devices()[0].device_kind)
    return StepTimer(
        config.batch_size,
        flops_per_image=None if frozen else training_flops(config.model),
        peak_flops=None if chip is None else devices * chip.peak_flops,
    )
