"""Opens the data of a run and plans its program, to check both before anything is written."""

import dataclasses

import jax

from vmoe import models
from vmoe.config import EvalConfig, Preprocessing, TrainConfig
from vmoe.data.pipeline import (
    Batch,
    Read,
    check_labeled,
    empty_batch,
    part_bytes,
    training_batches,
)
from vmoe.data.sources import SPLITS, Source, has_files, name_and_split, open_splits, relabel
from vmoe.data.workers import Batches, count_workers, num_threads
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
    num_workers: int
    """Processes that read images; 0 for threads."""
    num_threads: int


def open_data(config: TrainConfig) -> Data:
    """Opens the training images, the evaluation sets and the data of few-shot probes.

    The training images are the split train, unless the config names another.
    """
    checks, (name, split) = config.data.checks, name_and_split(config.data.name)
    trained = name, split or "train"
    wanted = [trained, *(_evaluation_split(each.data, name, split) for each in config.evaluations)]
    opened: dict[tuple[str, str], Source] = {}
    for data_set in dict.fromkeys(each for each, _ in wanted):
        splits = list(dict.fromkeys(split for each, split in wanted if each == data_set))
        sources = open_splits(data_set, splits, checks)
        opened |= {(data_set, split): own for split, own in zip(splits, sources, strict=True)}
    source, *others = (opened[each] for each in wanted)
    evaluations = [
        (each, relabel(own, source.class_names))
        for each, own in zip(config.evaluations, others, strict=True)
    ]
    fewshot = open_fewshot(config.fewshot, checks)
    probed = [own for each in fewshot for own in each.sources]
    if checks.check == "decode" and not any(map(has_files, [*opened.values(), *probed])):
        problem = "only the files of folder: and manifest: are checked, so this has no effect"
        fields = {"data.check": "decode", "data.name": config.data.name}
        raise UsageError(f"{problem}; use headers", **fields)
    return Data(source, evaluations, fewshot)


def plan_program(
    config: TrainConfig,
    data: Data,
    *,
    mesh: str,
    fsdp: bool,
    share: tuple[int, int] | None = None,
) -> Program:
    """Traces the training step and the evaluations on shapes; uses no collective.

    Args:
        share: see ``count_workers``.
    """
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
    read = [(data.source, config.batch_size, own)]  # with sizes of batches and preprocessing
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
        read.append((source, each.batch_size, prepared))
    if data.fewshot:
        model = models.with_params(config.model, shapes.params, placement=placement)
        check_fewshot(model, config.fewshot, config.preprocessing)
        how = config.fewshot.batch_size, config.fewshot.prepare(config.preprocessing)
        read += [(source, *how) for each in data.fewshot for source in each.sources]
    part = max(part_bytes(placement.round_up(size) // shards, own) for _, size, own in read)
    images = config.total_steps * config.batch_size // shards
    asked = config.data.num_workers
    count = count_workers(asked, data.source, images, part, share=share)
    threads = 0 if count else max(num_threads(x, part_bytes(1, own)) for x, _, own in read)
    return Program(placement, batches, train_step, shapes, count, threads)


def padding_batch(config: TrainConfig, source: Source, placement: Placement) -> Batch:
    """A training batch of padding, on the devices."""
    _, shards = placement.process_shard()
    size = Preprocessing(config.model.image_size)
    batch = empty_batch(config.batch_size // shards, source.max_labels, size)
    return placement.make_global_array(batch)


def _evaluation_split(data: str, trained: str, trained_split: str) -> tuple[str, str]:
    """The name and the split of an evaluation set.

    Args:
        data: as in ``EvalConfig``.
        trained: the data set of the training images.
        trained_split: its split in the config; empty if there is none.
    """
    if data in SPLITS:
        if trained_split not in ("", *SPLITS):
            raise UsageError(
                "both may have the same images, as a missing split is split off train; "
                f"name one, such as {trained}:train[99%:]",
                **{"evaluations.data": data, "data.name": f"{trained}:{trained_split}"},
            )
        return trained, data
    name, split = name_and_split(data)
    if not split:
        problem = f"give {', '.join(SPLITS)}, or NAME:SPLIT of another data set"
        raise UsageError(problem, **{"evaluations.data": name})
    return name, split
