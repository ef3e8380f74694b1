"""A run from its first step, or from where it stopped, to its last."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal, NamedTuple

import grain
import jax
import numpy as np

from vmoe import distributed, models
from vmoe.checkpoints.run import Checkpoints
from vmoe.config import EvalConfig, TrainConfig
from vmoe.data.pipeline import READ_AHEAD, Batch, training_batches
from vmoe.data.sources import SPLITS, Source, name_and_split, open_source, relabel
from vmoe.errors import Failure, Stopped, UsageError
from vmoe.evaluate import Evaluation, evaluate
from vmoe.mesh import place
from vmoe.sharding import Placement
from vmoe.signals import Interrupted, Signals
from vmoe.train.report import NullReport, Report, report_of
from vmoe.train.state import State
from vmoe.train.step import Metrics, Program, compile_program
from vmoe.workdir.lock import lock_workdir

Evaluations = list[tuple[str, str, Evaluation]]  # the set's name, whose weights, what came out


def train(
    config: TrainConfig,
    workdir: str | Path,
    *,
    mesh: str = "",
    fsdp: bool = False,
    on_nan: Literal["stop", "rewind"] = "stop",
    max_rewinds: int = 3,
) -> Evaluations:
    """Trains to the end and returns the evaluations of the last step.

    Everything of the run lies in the folder ``workdir``; called again with the same config it
    goes on from the newest good checkpoint, and a finished run is only evaluated.

    Args:
        mesh: over how many devices a batch and the experts are spread, "data=4,expert=8"; derived
            from the devices at hand if empty.
        fsdp: split large dense parameters and optimiser state over "data" as well.
        on_nan: what happens when a loss or gradient is NaN or infinite: the run ends, or it goes
            back to the newest checkpoint and on past the batches that led there.
        max_rewinds: how often at most it goes back.

    Raises:
        UsageError: the folder is another run's, the data does not fit the model, or the model or
            the batch do not divide over the devices.
        Failure: a loss that is no number, a disk that is full, no checkpoint that is good.
        Stopped: SIGINT or SIGTERM came; everything is saved.
    """
    workdir = Path(workdir)
    source = open_source(config.data.name, "train")
    sets = [(settings, _source(settings, config, source)) for settings in config.evaluations]
    placement = place(config.model, jax.devices(), mesh=mesh, fsdp=fsdp)
    placement.check_batch(config.batch_size)
    part, parts = placement.process_shard()
    batches = training_batches(
        source, config, share=(part, parts), devices=placement.devices // parts
    )
    program = compile_program(config, placement)
    # What cannot work is refused before anything is written.
    first = placement.make_global_array(batches[0])
    jax.eval_shape(program.step, program.like, first)
    for settings in config.evaluations:
        _check_evaluation(settings, config, placement)
    with (
        Signals() as signals,
        lock_workdir(workdir, config, source, placement) as told,
        Checkpoints(
            workdir, every=config.checkpoint_every, keep_latest=config.keep_latest
        ) as checkpoints,
        report_of(workdir, config) as report,
        distributed.abort_on_error(),  # innermost: what is entered before waits for the others as it ends
    ):
        for line in told:
            report.say(line)
        if placement.mesh is not None:
            share = config.batch_size // placement.devices
            report.say(
                f"mesh {placement}: {placement.devices} devices, {jax.process_count()} processes; "
                f"{share} images a device, which form its groups"
            )
        for opened in (source, *(source for _, source in sets)):
            if opened.skipped:
                report.say(f"{opened.name}: {opened.skipped} files are no images, left out")
        if not distributed.is_single_process():
            # A collective waits only so long for the slowest to join in, so all compile first.
            program.step.lower(program.like, first, placement.per_device_flag(False)).compile()
            distributed.barrier("compiled")
        del first  # a whole batch, on the devices
        loop = _Loop(config, placement, sets, batches, program, signals, checkpoints, report)
        state = loop.resume()
        while True:
            try:
                return loop.to_the_end(state)
            except _NotFinite as broken:
                rewinds = loop.rewinds + 1
                if on_nan == "stop" or rewinds > max_rewinds:
                    checkpoints.wait()
                    failure = Failure(broken.advice(on_nan, checkpoints.steps))
                    raise distributed.synchronized(failure) from None
                report.say(f"{broken}: goes back, {rewinds} of at most {max_rewinds} times")
                # To a step that is due: where a signal stopped the run must not matter.
                checkpoints.delete_unscheduled()
                batch, rewinds = jax.device_put(
                    (np.int32(broken.batch + 1), np.int32(rewinds)), placement.replicated()
                )
                state = loop.resume()._replace(batch=batch, rewinds=rewinds)


class _Loop:
    """What a run works with, and where it is."""

    def __init__(
        self,
        config: TrainConfig,
        placement: Placement,
        sets: list[tuple[EvalConfig, Source]],
        batches: grain.MapDataset[Batch],
        program: Program,
        signals: Signals,
        checkpoints: Checkpoints,
        report: Report | NullReport,
    ):
        self._config, self._placement = config, placement
        self._sets, self._batches = sets, batches
        self._program, self._signals = program, signals
        self._checkpoints, self._report = checkpoints, report
        self._taken: _Taken | None = None
        self._asked = False
        self.rewinds = 0

    def resume(self) -> State:
        """The state of the newest good checkpoint; the first one where there is none."""
        self._checkpoints.wait()
        if self._checkpoints.begun:
            _, found, told = self._checkpoints.restore_newest(
                **checkpoint_items(self._program.like)
            )
            (step, batch, rewinds, moments), ema = found["training"], found.get("ema")
            state = State(step, batch, rewinds, found["params"], moments, ema)
            for line in told:
                self._report.say(line)
        else:
            state = self._program.init()
        self._report.goes_on(int(state.step))
        return state

    def to_the_end(self, state: State) -> Evaluations:
        """From a state to the last step; each is taken, reported, evaluated and saved in turn."""
        config, report = self._config, self._report
        step = saved = int(state.step)
        batch, self.rewinds, self._taken = int(state.batch), int(state.rewinds), None
        feed = _stream(self._batches, batch, config.steps - step)
        while True:
            try:
                if self._due(step, config.evaluate_every):
                    found = self._evaluate(state, step)
                if self._due(step, config.checkpoint_every):
                    saved = self._save(state, step, saved)
                if step == config.steps:
                    return found
                if self._asked or (distributed.is_single_process() and self._signals.asked):
                    self._stop(state, step, saved)
                images = self._placement.make_global_array(next(feed))
            except Interrupted:
                self._stop(state, step, saved)
            except UsageError:  # a file that is no image
                if distributed.is_single_process():  # the others are at the next step
                    self._save(state, step, saved)
                raise
            asked = self._placement.per_device_flag(bool(self._signals.asked))
            state, metrics = self._program.step(state, images, asked)
            self._check_taken()  # the step before: the device is busy with this one
            step, batch = step + 1, batch + 1
            self._taken = _Taken(step, batch - 1, metrics)
            report.step(step)
            if self._due(step, config.log_every):
                self._check_taken()
                report.metrics(step, metrics)

    def _due(self, step: int, every: int) -> bool:
        return step > 0 and (step % every == 0 or step == self._config.steps)

    def _check_taken(self) -> None:
        """Whether the last step known of was finite, and whether a process asked for a stop."""
        if self._taken is None:
            return
        if not self._taken.metrics["finite"]:
            raise _NotFinite(self._taken)
        self._asked |= bool(self._taken.metrics["stop"])

    def _evaluate(self, state: State, step: int) -> Evaluations:
        """Every set, with the parameters and with their average where there is one."""
        self._check_taken()
        written = distributed.any_process(self._report.evaluated(step))
        if written and step < self._config.steps:
            return []
        found = []
        for settings, source in self._sets:
            for weights, params in (("raw", state.params), ("ema", state.ema)):
                if params is None:
                    continue
                with self._report.aside(f"evaluating {settings.name}"):
                    evaluation = evaluate(
                        models.with_params(
                            settings.model(self._config.model), params, placement=self._placement
                        ),
                        source,
                        batch_size=settings.batch_size,
                        image_size=settings.image_size,
                        each=self._signals.check,
                    )
                found.append((settings.name, weights, evaluation))
        if not written:
            self._report.evaluations(step, found)
        return found

    def _save(self, state: State, step: int, saved: int) -> int:
        self._check_taken()
        if step > saved:
            self._checkpoints.save(step, **checkpoint_items(state))
        return step

    def _stop(self, state: State, step: int, saved: int) -> None:
        self._save(state, step, saved)
        self._checkpoints.wait()
        who = self._signals.asked or "a signal to another process"
        raise Stopped(
            f"{who}: stopped after step {step} of {self._config.steps}, everything is saved; the "
            "same line goes on"
        )


class _Taken(NamedTuple):
    """A step that was taken, perhaps not finished yet, and the number of its batch."""

    step: int
    batch: int
    metrics: Metrics


class _NotFinite(Exception):
    """The loss or the gradient of a step is NaN or infinite."""

    def __init__(self, taken: _Taken):
        found = {name: float(taken.metrics[name]) for name in ("loss", "gradient_norm", "lr")}
        super().__init__(
            f"step {taken.step}: loss {found['loss']:.4g}, gradient norm "
            f"{found['gradient_norm']:.4g}, learning rate {found['lr']:.3g}"
        )
        self.batch = taken.batch

    def advice(self, on_nan: str, steps: list[int]) -> str:
        good = f"step {steps[-1]} is the last good checkpoint" if steps else "no checkpoint yet"
        remedy = "lower --optim.lr or --optim.grad-clip-norm, in another --workdir"
        if on_nan == "stop":
            remedy += ", or go on past this data by the same line with --on-nan rewind"
        return f"{self}; {good}; {remedy}"


def checkpoint_items(state: State) -> dict[str, Any]:
    """The items of a checkpoint; see ``checkpoints/run.py``."""
    training = (state.step, state.batch, state.rewinds, state.moments)
    ema = {} if state.ema is None else {"ema": state.ema}
    return {"params": state.params, "training": training, **ema}


def _stream(batches: grain.MapDataset[Batch], start: int, count: int) -> Iterator[Batch]:
    return iter(batches[start : start + count].to_iter_dataset(READ_AHEAD) if count else ())


def _source(settings: EvalConfig, config: TrainConfig, trained: Source) -> Source:
    """What a set evaluates on, its classes those of the training data."""
    if settings.data in SPLITS:
        name, split = config.data.name, settings.data
    else:
        name, split = name_and_split(settings.data)
        if not split:
            raise UsageError(
                f"evaluations.data={name}: give {', '.join(SPLITS)}, or NAME:SPLIT of another data "
                "set"
            )
    return relabel(open_source(name, split), trained.class_names)


def _check_evaluation(settings: EvalConfig, config: TrainConfig, placement: Placement) -> None:
    side = settings.image_size or config.model.image_size
    model = settings.model(config.model)
    placement.check(model)
    images = jax.ShapeDtypeStruct((placement.round_up(settings.batch_size), side, side, 3), "f4")
    jax.eval_shape(lambda images: models.build(model, placement=placement)(images), images)
