"""The training loop, from the first step or the newest checkpoint to the last step.

``setup`` checks and opens everything. An *attempt* trains from a state to the end; after a loss
that is not finite another attempt may start, from a checkpoint. An attempt is a flat loop: save if
due, probe if due, evaluate if due, save if it is the best, stop or end, next batch, step, report.
"""

import contextlib
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, Literal

import jax
import numpy as np

from vmoe import distributed
from vmoe.checkpoints.restore import has_checkpoint
from vmoe.config import TrainConfig
from vmoe.data.pipeline import Read
from vmoe.data.reading import Reader
from vmoe.data.workers import WorkerDied
from vmoe.errors import Failure, Stopped, UsageError
from vmoe.evaluate import NamedEvaluation
from vmoe.train.batches import must_stop, next_batch, open_reader, show_examples, warn_of_images
from vmoe.train.evaluations import evaluate_all, probe
from vmoe.train.init import InitFrom
from vmoe.train.setup import Run, setup
from vmoe.train.sinks import Position, Sink
from vmoe.train.state import (
    State,
    checkpoint_items,
    from_checkpoint_items,
    init_state,
)
from vmoe.train.status import NotFinite, StepStatus
from vmoe.workdir.layout import extend, interval_changed_at


def train(
    config: TrainConfig,
    workdir: str | Path,
    *,
    init: str | Path | InitFrom | None = None,
    mesh: str = "",
    fsdp: bool = False,
    on_nan: Literal["stop", "rewind"] = "stop",
    max_rewinds: int = 3,
    profile: str = "",
    wandb: str | None = None,
    sinks: Sequence[Sink] = (),
) -> list[NamedEvaluation]:
    """Trains to the last step and returns its evaluations.

    All files of the run are in the folder ``workdir``. Called again with the same config it resumes
    from the newest valid checkpoint; a finished run is only evaluated. A config with more steps
    extends a run.

    Args:
        init: a trained model whose parameters a new run starts from; see ``vmoe.load``. The head
            is new if the number of classes differs, and positions are resampled.
        mesh: devices per axis, "data=4,expert=8": a batch is sharded over all of them, the experts
            over the second axis; derived from the model and the devices if empty.
        fsdp: also shard large dense parameters and optimizer state over "data".
        on_nan: the reaction to a NaN or infinite loss or gradient: end the run, or go back to
            the newest scheduled checkpoint and skip the batches up to the one that failed.
        max_rewinds: maximum number of rewinds.
        profile: steps to trace for a profiler, once in the life of the run: "10:15".
        wandb: also log to this project of Weights & Biases; if empty, to the project of the run, to
            ``WANDB_PROJECT``, or to "vmoe". None does not log to Weights & Biases.
        sinks: objects of your own that get every report of the run, such as the load of each
            expert; see ``Sink``. With several processes, only those of the first one are used.

    Raises:
        UsageError: the folder belongs to another run, the data does not fit the model, the model or
            the batch cannot be split over the devices, ``profile`` or ``wandb`` is wrong, or the
            processes of the run differ in their config, options, data or versions.
        Failure: the loss is not finite, the disk is full, no checkpoint is valid, or W&B or the
            profiler fails.
        Stopped: SIGINT, SIGTERM or SIGHUP was received; a checkpoint is saved, unless no step was
            taken.
    """
    source = InitFrom(str(init)) if isinstance(init, str | Path) else init
    with setup(
        config,
        Path(workdir).expanduser(),
        init=source,
        mesh=mesh,
        fsdp=fsdp,
        profile=profile,
        wandb=wandb,
        sinks=sinks,
        on_nan=on_nan,
        max_rewinds=max_rewinds,
    ) as run:
        state = _restore_or_init(run)
        while True:
            rewinds = int(state.rewinds)
            try:
                with open_reader(run, state) as reader:
                    return _attempt(run, state, reader)
            except NotFinite as error:
                if on_nan == "stop" or rewinds == max_rewinds:
                    run.checkpoints.wait()
                    failure = _not_finite(error, on_nan, run.checkpoints.steps)
                    raise distributed.synchronized(failure) from None
                run.report.log(f"{error}: rewinding, {rewinds + 1} of at most {max_rewinds} times")
                batch = error.batch + 1
            # Not in the handler: the traceback of the error holds the state that failed.
            state = _rewind(run, batch=batch, rewinds=rewinds + 1)


def _attempt(run: Run, state: State, reader: Reader[Read]) -> list[NamedEvaluation]:
    """Trains from a state to the last step.

    Args:
        reader: returns the batches, from the next batch of the state on.
    """
    config, report = run.config, run.report
    step, batch = int(state.step), int(state.batch)
    evaluations, status = None, StepStatus(run.program.placement)
    while True:
        # First: whatever ends the process while it probes or evaluates, no step is lost.
        if _due(step, config.checkpoint_every, config.total_steps):
            status.read()
            _save(run, state, step)
        if run.data.fewshot and _due(step, config.fewshot.every, config.total_steps):
            status.read()
            with _saved_on_error(run, state, step, status):
                probe(run, state, step, status)
        if _due(step, config.evaluate_every, config.total_steps):
            status.read()
            with _saved_on_error(run, state, step, status):
                evaluations = evaluate_all(run, state, step, status)
            if run.checkpoints.is_best(step):
                _save(run, state, step)
        if step == config.total_steps and evaluations is not None:
            return evaluations
        with _saved_on_error(run, state, step, status):
            images = None if status.stop or must_stop(run) else next_batch(run, reader, step + 1)
        if images is None:
            status.read()
            _save(run, state, step)
            raise _stopped(run, step)
        with report.compiling("the training step"):
            state, metrics = run.program.train_step(state, images)
        step, batch = step + 1, batch + 1
        run.profiler.stop(step, metrics)
        status.add(step, batch - 1, metrics, stop=bool(run.signals.requested))
        report.step(step)
        if _due(step, config.log_every, config.total_steps):
            status.read()
            report.metrics(step, metrics)
            if step <= config.log_every:
                show_examples(run, step, images, batch - 1)
            warn_of_images(run)


def _due(step: int, every: int, last: int) -> bool:
    return step > 0 and (step % every == 0 or step == last)


def _save(run: Run, state: State, step: int) -> None:
    warn_of_images(run)
    if step == run.checkpoints.saved:
        return
    with run.report.measure("reporting"), run.report.showing(f"saving step {step}"):
        run.checkpoints.save(step, run.report.positions(), **checkpoint_items(state))
        if run.extended:
            run.checkpoints.wait()
            extend(run.workdir, run.config)


@contextlib.contextmanager
def _saved_on_error(run: Run, state: State, step: int, status: StepStatus) -> Iterator[None]:
    """Saves the state when an image cannot be read, a worker has died or memory runs out.

    With several processes nothing is saved, since the others may already be at the next step.
    """
    try:
        yield
    except Exception as error:
        if distributed.is_single_process():
            status.read()
            _save(run, state, step)
        if isinstance(error, WorkerDied):
            resume = WorkerDied(f"{error}; run the same command to resume")
            raise resume.remedied_by(**error.remedies) from None
        raise


def _stopped(run: Run, step: int) -> Stopped:
    run.checkpoints.wait()
    reason = run.signals.requested or "a signal to another process"
    if step == 0:
        return Stopped(f"{reason}: stopped before the first step; run the same command to start")
    return Stopped(
        f"{reason}: checkpoint saved at step {step} of {run.config.steps}; run the same command to "
        "resume"
    )


def _restore_or_init(run: Run) -> State:
    """The state of the newest valid checkpoint, or the first state if there is no checkpoint."""
    run.checkpoints.wait()
    if not distributed.from_primary(lambda: has_checkpoint(run.workdir)):
        run.report.resume(0, {})
        state = init_state(run.config, run.program.placement)
        return run.initial.apply(state) if run.initial else state
    restored = run.checkpoints.restore_newest(**checkpoint_items(run.program.abstract_state))
    for message in restored.messages:
        run.report.log(message)
    if restored.step > run.config.total_steps:
        raise distributed.synchronized(
            UsageError(
                f"the run in {run.workdir} is at step {restored.step}; give at least as many",
                steps=run.config.steps,
            )
        )
    run.report.resume(restored.step, {k: Position(*v) for k, v in restored.files.items()})
    return from_checkpoint_items(restored.items)


def _rewind(run: Run, *, batch: int, rewinds: int) -> State:
    """The state of the newest scheduled checkpoint, with the batches before ``batch`` skipped.

    Checkpoints saved on a signal are deleted, so that stops do not change the result of a run.
    """
    run.checkpoints.delete_unscheduled(keep=interval_changed_at(run.workdir))
    state = _restore_or_init(run)
    counts = jax.device_put((np.int32(batch), np.int32(rewinds)), state.batch.sharding)
    return state._replace(batch=counts[0], rewinds=counts[1])


def _not_finite(error: NotFinite, on_nan: str, steps: list[int]) -> Failure:
    last = f"step {steps[-1]} is the last checkpoint" if steps else "there is no checkpoint yet"
    remedy = "lower optim.lr or optim.grad_clip_norm, in another workdir"
    fields: dict[str, Any] = {"optim.lr": None, "optim.grad_clip_norm": None, "workdir": None}
    if on_nan == "stop":
        remedy += ", or skip these batches: the same command with on_nan=rewind"
        fields["on_nan"] = "rewind"
    return Failure(f"{error}; {last}; {remedy}").remedied_by(**fields)
