"""Checks and opens everything that a run needs, before the first step."""

import contextlib
import dataclasses
import functools
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax

from vmoe import distributed, models
from vmoe.checkpoints.run import Checkpoints
from vmoe.config import EvalConfig, Preprocessing, TrainConfig, replace, to_json
from vmoe.data.pipeline import Batch, Read, check_labelled, empty_batch, training_batches
from vmoe.data.problems import Refused, Unreadable
from vmoe.data.sources import SPLITS, Source, name_and_split, open_source, relabel
from vmoe.data.workers import Batches, Workers, check_shared_memory
from vmoe.errors import UsageError
from vmoe.evaluate import check_evaluation
from vmoe.evaluate.fewshot import check_fewshot
from vmoe.evaluate.fewshot_data import FewShotData, open_fewshot
from vmoe.mesh import place
from vmoe.sharding import Placement
from vmoe.signals import Signals
from vmoe.train.environment import environment, shared
from vmoe.train.folder import open_workdir
from vmoe.train.init import Init, InitFrom, read_source
from vmoe.train.lr_factors import Params
from vmoe.train.messages import first_messages
from vmoe.train.profile import Profiler, parse_steps
from vmoe.train.report import NullReport, Report, make_report
from vmoe.train.state import State, abstract_state
from vmoe.train.step import make_train_step
from vmoe.train.wandb_writer import check_wandb
from vmoe.workdir.layout import has_config
from vmoe.workdir.lock import lock_workdir


@dataclasses.dataclass(frozen=True)
class Checked:
    """What a run needs of its arguments alone; nothing is written to make it."""

    config: TrainConfig
    """Its length is in steps."""
    source: Source
    """The training images."""
    batches: Batches[Read]
    """Training batches by number; only the shard of each that this process reads."""
    evaluations: list[tuple[EvalConfig, Source]]
    fewshot: tuple[FewShotData, ...]
    placement: Placement
    train_step: jax.stages.Wrapped
    """(state, batch) -> (state, metrics)"""
    abstract_state: State
    """Shapes, dtypes and shardings of the state."""
    initial: Init | None
    """Parameters to start from, if there is no checkpoint."""
    traced_steps: tuple[int, int] | None
    """The first and the last step to trace for a profiler."""
    environment: dict[str, Any]


@dataclasses.dataclass(frozen=True)
class Run(Checked):
    """Everything that a run needs."""

    workdir: Path
    workers: Workers
    """The processes that read."""
    replaced: Unreadable
    """Training images that could not be read."""
    refused: Refused
    """Training images that the fast decoder refused."""
    left_out: Unreadable
    """Images of the evaluation sets that could not be read."""
    extended: bool
    """Whether the config in the folder has fewer steps; for the primary process."""
    signals: Signals
    checkpoints: Checkpoints
    report: Report | NullReport
    profiler: Profiler


@contextlib.contextmanager
def setup(
    config: TrainConfig,
    workdir: Path,
    *,
    init: InitFrom | None = None,
    mesh: str = "",
    fsdp: bool = False,
    profile: str = "",
    wandb: str | None = None,
    **others: Any,
) -> Iterator[Run]:
    """Checks that everything fits, then locks the run folder and opens its files.

    Nothing is written before the config, the data and the model are known to fit, and to be the
    same in all processes.

    Args:
        others: further options that have to be the same in all processes.

    Raises:
        UsageError: the folder is another run's, the data does not fit the model, the model or the
            batch cannot be split over the devices, ``init`` has other parameters, ``profile`` is
            wrong, W&B is not ready, or another process has other options, data or versions.
    """

    def check() -> Checked:
        if wandb is not None:
            check_wandb(workdir, wandb)
        return _check(config, workdir, init=init, mesh=mesh, fsdp=fsdp, profile=profile)

    checked = distributed.raise_together(check)
    options = {"profile": profile, "wandb": wandb, **others}
    record = None if checked.initial is None else checked.initial.record
    # Each process may read with as many workers as its host has cores for.
    fields = json.loads(to_json(replace(config, data=dict(num_workers=0))))
    distributed.check_same(fields | options | shared(checked.environment) | {"init": record})
    config = checked.config
    open_report = functools.partial(
        make_report, workdir, config, devices=checked.placement.devices, wandb=wandb
    )
    with (
        lock_workdir(workdir),
        Signals() as signals,
        Workers(config.data.num_workers) as workers,
    ):
        changed, extended = open_workdir(
            workdir, config, checked.source.class_names, checked.environment, checked.initial
        )
        with (
            Checkpoints(
                workdir, every=config.checkpoint_every, keep_latest=config.keep_latest
            ) as checkpoints,
            distributed.raise_together(open_report) as report,
            Profiler(workdir, checked.traced_steps, report) as profiler,
            distributed.abort_on_error(),  # innermost: the contexts above wait for other processes
        ):
            messages = first_messages(
                config,
                checked.placement,
                checked.source,
                checked.evaluations,
                checked.fewshot,
                checked.initial,
                checked.abstract_state.params,
            )
            for message in [*messages, *changed]:
                report.log(message)
            if not distributed.is_single_process():
                # A collective times out on the slowest process, so all of them compile first.
                first = _empty_batch(config, checked.source, checked.placement)
                checked.train_step.lower(checked.abstract_state, first).compile()
                del first  # frees the memory of a batch
                with signals.at_once():
                    distributed.barrier("compiled")
            yield Run(
                **vars(checked),
                workdir=workdir,
                workers=workers,
                replaced=Unreadable("replaced by another image"),
                refused=Refused(),
                left_out=Unreadable("left out of evaluations"),
                extended=extended,
                signals=signals,
                checkpoints=checkpoints,
                report=report,
                profiler=profiler,
            )


def _check(
    config: TrainConfig,
    workdir: Path,
    *,
    init: InitFrom | None,
    mesh: str,
    fsdp: bool,
    profile: str,
) -> Checked:
    """Opens the data and traces the programs, without a collective."""
    if not has_config(workdir):
        config.optim.check_decay()
    name, split = name_and_split(config.data.name)
    source = _open(name, split or "train", config)
    config = config.with_steps(len(source))
    traced_steps = parse_steps(profile, config.total_steps)
    evaluations = [(each, _evaluation_source(each, config, source)) for each in config.evaluations]
    fewshot = open_fewshot(config.fewshot, check=config.data.check, on_error=config.data.on_error)
    placement = place(config.model, jax.devices(), mesh=mesh, fsdp=fsdp)
    placement.check_batch(config.batch_size, config.accumulate)
    shard, shards = placement.process_shard()
    batches = training_batches(source, config, shard=(shard, shards))
    for data in (source, *(own for _, own in evaluations)):
        check_labelled(data)
    train_step, shapes = make_train_step(config, placement), abstract_state(config, placement)
    jax.eval_shape(train_step, shapes, _empty_batch(config, source, placement))
    for each, data in evaluations:
        _check_evaluation(each, data, config, placement, shapes.params)
    if fewshot:
        model = models.with_params(config.model, shapes.params, placement=placement)
        check_fewshot(model, config.fewshot, config.preprocessing)
    check_shared_memory(config.data.num_workers, _largest_batch(config) // shards)
    measured = {each.name: own for each, own in evaluations}
    measured |= {f"few-shot {own.name}": own for each in fewshot for own in each.sources}
    return Checked(
        config,
        source,
        batches,
        evaluations,
        fewshot,
        placement,
        train_step=train_step,
        abstract_state=shapes,
        initial=read_source(init, workdir, config.model),
        traced_steps=traced_steps,
        environment=environment(source, measured, placement),
    )


def _empty_batch(config: TrainConfig, source: Source, placement: Placement) -> Batch:
    """A training batch of padding, on the devices."""
    _, shards = placement.process_shard()
    size = Preprocessing(config.model.image_size)
    batch = empty_batch(config.batch_size // shards, source.max_labels, size)
    return placement.make_global_array(batch)


def _evaluation_source(evaluation: EvalConfig, config: TrainConfig, trained: Source) -> Source:
    """The data of an evaluation set, labelled by the classes of the training data."""
    if evaluation.data in SPLITS:
        name, trained_split = name_and_split(config.data.name)
        split = evaluation.data
        if trained_split not in ("", *SPLITS):
            raise UsageError(
                f"evaluations.data={split}: may have images of data.name={config.data.name}, as a "
                f"split that is missing is split off train; name one, such as {name}:train[99%:]"
            )
    else:
        name, split = name_and_split(evaluation.data)
        if not split:
            raise UsageError(
                f"evaluations.data={name}: give {', '.join(SPLITS)}, or NAME:SPLIT of another data "
                "set"
            )
    return relabel(_open(name, split, config), trained.class_names)


def _open(name: str, split: str, config: TrainConfig) -> Source:
    return open_source(name, split, check=config.data.check, on_error=config.data.on_error)


def _check_evaluation(
    evaluation: EvalConfig,
    source: Source,
    config: TrainConfig,
    placement: Placement,
    params: Params,
) -> None:
    model = evaluation.model(config.model)
    placement.check(model)
    check_evaluation(
        models.with_params(model, params, placement=placement),
        batch_size=evaluation.batch_size,
        preprocessing=evaluation.prepare(config.data, model),
        max_labels=source.max_labels,
    )


def _largest_batch(config: TrainConfig) -> int:
    """The bytes of the pixels of the largest batch, of training, evaluation or a probe."""
    own = Preprocessing(config.model.image_size)
    batches = [(config.batch_size, own)]
    for each in config.evaluations:
        batches.append((each.batch_size, each.prepare(config.data, config.model)))
    if config.fewshot.data:
        own = config.fewshot.prepare(config.preprocessing)
        batches.append((config.fewshot.batch_size, own))
    return max(empty_batch(1, 1, own).images.nbytes * size for size, own in batches)
