"""Opens the data of a run and plans its program, to check both before anything is written."""

import dataclasses
from typing import Any

import jax

from vmoe import models
from vmoe.config import EvalConfig, Preprocessing, TrainConfig
from vmoe.data.pipeline import Batch, Read, check_labeled, empty_batch, training_batches
from vmoe.data.sources import SPLITS, Source, has_files, name_and_split, open_source, relabel
from vmoe.data.workers import Batches, check_shared_memory
from vmoe.errors import UsageError
from vmoe.evaluate import check_evaluation
from vmoe.evaluate.fewshot import FewShotData, check_fewshot, open_fewshot
from vmoe.mesh import place
from vmoe.sharding import Placement
from vmoe.train.state import State, abstract_state
from vmoe.train.step import make_train_step


@dataclasses.dataclass(frozen=True)
class Data:
    """The images of a run."""

    source: Source
    """The training images."""
    evaluations: list[tuple[EvalConfig, Source]]
    fewshot: tuple[FewShotData, ...]


@dataclasses.dataclass(frozen=True)
class Program:
    """The program that the devices run, and its batches."""

    placement: Placement
    batches: Batches[Read]
    """Training batches by number; only the shard of each that this process reads."""
    train_step: jax.stages.Wrapped
    """(state, batch) -> (state, metrics)"""
    abstract_state: State
    """Shapes, dtypes and shardings of the state."""


def open_training_data(config: TrainConfig) -> Source:
    """The training images: the split train, unless the config has another."""
    name, split = name_and_split(config.data.name)
    return _open(name, split or "train", config)


def open_data(config: TrainConfig, source: Source) -> Data:
    """Opens the evaluation sets and the data of few-shot probes; adds the training images."""
    evaluations = [(each, _evaluation_source(each, config, source)) for each in config.evaluations]
    fewshot = open_fewshot(config.fewshot, **_reading(config))
    probed = [own for each in fewshot for own in each.sources]
    opened = [source, *(own for _, own in evaluations), *probed]
    if config.data.check == "decode" and not any(map(has_files, opened)):
        problem = "only the files of folder: and manifest: are checked, so this has no effect"
        fields = {"data.check": "decode", "data.name": config.data.name}
        raise UsageError(f"{problem}; use headers", **fields)
    return Data(source, evaluations, fewshot)


def plan_program(config: TrainConfig, data: Data, *, mesh: str, fsdp: bool) -> Program:
    """Traces the training step and the evaluations on shapes; uses no collective."""
    placement = place(config.model, jax.devices(), mesh=mesh, fsdp=fsdp)
    placement.check_batch(config.batch_size, config.accumulate)
    shard, shards = placement.process_shard()
    batches = training_batches(data.source, config, shard=(shard, shards))
    for each in (data.source, *(own for _, own in data.evaluations)):
        check_labeled(each)
    train_step, shapes = make_train_step(config, placement), abstract_state(config, placement)
    own = Preprocessing(config.model.image_size)
    # Zeros that are only traced take no memory, neither here nor on the devices.
    whole = empty_batch(config.batch_size, data.source.max_labels, own)
    jax.eval_shape(train_step, shapes, whole)
    read = [(config.batch_size, own)]  # sizes of batches, and their preprocessing
    for each, source in data.evaluations:
        model, prepared = each.model(config.model), each.prepare(config.data, config.model)
        placement.check(model)
        check_evaluation(
            models.with_params(model, shapes.params, placement=placement),
            batch_size=each.batch_size,
            preprocessing=prepared,
            loss=config.loss,
            max_labels=source.max_labels,
        )
        read.append((each.batch_size, prepared))
    if data.fewshot:
        model = models.with_params(config.model, shapes.params, placement=placement)
        check_fewshot(model, config.fewshot, config.preprocessing)
        read.append((config.fewshot.batch_size, config.fewshot.prepare(config.preprocessing)))
    largest = max(empty_batch(1, 1, own).images.nbytes * size for size, own in read)
    check_shared_memory(config.data.num_workers, largest // shards)
    return Program(placement, batches, train_step, shapes)


def padding_batch(config: TrainConfig, source: Source, placement: Placement) -> Batch:
    """A training batch of padding, on the devices."""
    _, shards = placement.process_shard()
    size = Preprocessing(config.model.image_size)
    batch = empty_batch(config.batch_size // shards, source.max_labels, size)
    return placement.make_global_array(batch)


def _evaluation_source(evaluation: EvalConfig, config: TrainConfig, trained: Source) -> Source:
    """The data of an evaluation set, labeled by the classes of the training data."""
    if evaluation.data in SPLITS:
        name, trained_split = name_and_split(config.data.name)
        split = evaluation.data
        if trained_split not in ("", *SPLITS):
            raise UsageError(
                "both may have the same images, as a missing split is split off train; "
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
    return open_source(name, split, **_reading(config))


def _reading(config: TrainConfig) -> dict[str, Any]:
    """How images are checked when a data set is opened."""
    data = config.data
    return dict(check=data.check, on_error=data.on_error, max_pixels=data.max_pixels)
