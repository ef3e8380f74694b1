"""Checks everything that a run needs of its arguments, before anything is written."""

import dataclasses
from pathlib import Path
from typing import Any

import jax

from vmoe import models
from vmoe.config import EvalConfig, Preprocessing, TrainConfig
from vmoe.data.pipeline import Batch, Read, check_labelled, empty_batch, training_batches
from vmoe.data.sources import SPLITS, Source, name_and_split, one_walk, open_source, relabel
from vmoe.data.workers import Batches, check_shared_memory
from vmoe.errors import UsageError
from vmoe.evaluate import check_evaluation
from vmoe.evaluate.fewshot import check_fewshot
from vmoe.evaluate.fewshot_data import FewShotData, open_fewshot
from vmoe.mesh import place
from vmoe.sharding import Placement
from vmoe.train.environment import environment
from vmoe.train.init import Init, InitFrom, read_source
from vmoe.train.lr_factors import Params
from vmoe.train.profile import parse_steps
from vmoe.train.state import State, abstract_state
from vmoe.train.step import make_train_step
from vmoe.train.wandb_run import check_wandb
from vmoe.workdir.layout import has_config


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


@one_walk()
def check(
    config: TrainConfig,
    workdir: Path,
    *,
    init: InitFrom | None,
    mesh: str,
    fsdp: bool,
    profile: str,
    wandb: str | None,
) -> Checked:
    """Opens the data and traces the programs, without a collective.

    Raises:
        UsageError: the data does not fit the model, the model or the batch cannot be split over the
            devices, ``init`` has other parameters, ``profile`` is wrong, or W&B is not ready.
    """
    if wandb is not None:
        check_wandb(workdir, wandb)
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
    jax.eval_shape(train_step, shapes, padding_batch(config, source, placement))
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


def padding_batch(config: TrainConfig, source: Source, placement: Placement) -> Batch:
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
                "both may have the same images, as a split that is missing is split off train; "
                f"name one, such as {name}:train[99%:]",
                **{"evaluations.data": split, "data.name": config.data.name},
            )
    else:
        name, split = name_and_split(evaluation.data)
        if not split:
            problem = f"give {', '.join(SPLITS)}, or NAME:SPLIT of another data set"
            raise UsageError(problem, **{"evaluations.data": name})
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
        loss=config.loss,
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
