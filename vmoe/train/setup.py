"""Checks and opens everything that a run needs, before the first step."""

import contextlib
import dataclasses
from collections.abc import Callable, Iterator
from pathlib import Path

import grain
import jax

from vmoe import distributed, models
from vmoe.checkpoints.run import Checkpoints
from vmoe.config import EvalConfig, TrainConfig
from vmoe.costs.summary import summarize
from vmoe.data.pipeline import Batch, training_batches
from vmoe.data.sources import SPLITS, Source, name_and_split, open_source, relabel
from vmoe.errors import UsageError
from vmoe.mesh import place
from vmoe.sharding import Placement
from vmoe.signals import Signals
from vmoe.train.environment import differences, environment
from vmoe.train.report import NullReport, Report, make_report
from vmoe.train.state import State, abstract_state
from vmoe.train.step import Metrics, make_train_step
from vmoe.workdir.layout import (
    check_same_run,
    has_config,
    read_environment,
    steps_of,
    write_metadata,
)
from vmoe.workdir.lock import lock_workdir


@dataclasses.dataclass(frozen=True)
class Run:
    """Everything that a run needs."""

    config: TrainConfig
    placement: Placement
    batches: grain.MapDataset[Batch]
    """Training batches by number; only the shard of each that this process reads."""
    evaluations: list[tuple[EvalConfig, Source]]
    train_step: Callable[[State, Batch], tuple[State, Metrics]]
    abstract_state: State
    """Shapes, dtypes and shardings of the state."""
    signals: Signals
    checkpoints: Checkpoints
    report: Report | NullReport


@contextlib.contextmanager
def setup(
    config: TrainConfig, workdir: Path, *, mesh: str = "", fsdp: bool = False
) -> Iterator[Run]:
    """Checks that everything fits, then locks the run folder and opens its files.

    Nothing is written before the config, the data and the model are known to fit.

    Raises:
        UsageError: the folder is another run's, the data does not fit the model, or the model or
            the batch cannot be split over the devices.
    """
    source = open_source(config.data.name, "train")
    evaluations = [(each, _evaluation_source(each, config, source)) for each in config.evaluations]
    placement = place(config.model, jax.devices(), mesh=mesh, fsdp=fsdp)
    placement.check_batch(config.batch_size)
    shard, shards = placement.process_shard()
    batches = training_batches(
        source, config, shard=(shard, shards), devices=placement.devices // shards
    )
    train_step, shapes = make_train_step(config, placement), abstract_state(config, placement)
    first = placement.make_global_array(batches[0])
    jax.eval_shape(train_step, shapes, first)
    for each in config.evaluations:
        _check_evaluation(each, config, placement)
    with Signals() as signals, lock_workdir(workdir):
        messages = _open_workdir(workdir, config, source, placement)
        with (
            Checkpoints(
                workdir, every=config.checkpoint_every, keep_latest=config.keep_latest
            ) as checkpoints,
            make_report(workdir, config) as report,
            distributed.abort_on_error(),  # innermost: the contexts above wait for other processes
        ):
            for message in [*messages, *_notes(config, placement, source, evaluations)]:
                report.log(message)
            if not distributed.is_single_process():
                # A collective times out on the slowest process, so all of them compile first.
                train_step.lower(shapes, first).compile()
                distributed.barrier("compiled")
            del first  # frees the memory of a batch
            yield Run(
                config=config,
                placement=placement,
                batches=batches,
                evaluations=evaluations,
                train_step=train_step,
                abstract_state=shapes,
                signals=signals,
                checkpoints=checkpoints,
                report=report,
            )


def _open_workdir(
    workdir: Path, config: TrainConfig, source: Source, placement: Placement
) -> list[str]:
    """Writes the metadata of a new run, or checks that the folder holds this one.

    Returns:
        messages about what has changed since the start of the run.
    """
    now = environment(source, placement)

    def open_folder() -> list[str]:
        if not distributed.is_primary():
            return []
        if has_config(workdir):
            check_same_run(workdir, config, source.class_names)
            return [f"{workdir}: {line}" for line in differences(read_environment(workdir), now)]
        if steps_of(workdir):
            raise UsageError(
                f"workdir {workdir}: it has checkpoints but no config.json, so their run is "
                "unknown: restore config.json, or use another workdir"
            )
        try:
            summary = summarize(config.model, title="model")
            write_metadata(workdir, config, source.class_names, environment=now, model=summary)
        except OSError as error:
            raise UsageError(f"workdir {workdir}: {error.strerror}") from None
        return []

    return distributed.raise_together(open_folder)


def _notes(
    config: TrainConfig,
    placement: Placement,
    source: Source,
    evaluations: list[tuple[EvalConfig, Source]],
) -> Iterator[str]:
    """Messages to log before the first step."""
    if placement.mesh is not None:
        share = config.batch_size // placement.devices
        yield (
            f"mesh {placement}: {placement.devices} devices, {jax.process_count()} processes; "
            f"each device has {share} images and forms groups among them"
        )
    for opened in (source, *(source for _, source in evaluations)):
        if opened.skipped:
            yield f"{opened.name}: {opened.skipped} files are not images and were skipped"


def _evaluation_source(evaluation: EvalConfig, config: TrainConfig, trained: Source) -> Source:
    """The data of an evaluation set, labelled by the classes of the training data."""
    if evaluation.data in SPLITS:
        name, split = config.data.name, evaluation.data
    else:
        name, split = name_and_split(evaluation.data)
        if not split:
            raise UsageError(
                f"evaluations.data={name}: give {', '.join(SPLITS)}, or NAME:SPLIT of another data "
                "set"
            )
    return relabel(open_source(name, split), trained.class_names)


def _check_evaluation(evaluation: EvalConfig, config: TrainConfig, placement: Placement) -> None:
    side = evaluation.image_size or config.model.image_size
    model = evaluation.model(config.model)
    placement.check(model)
    images = jax.ShapeDtypeStruct((placement.round_up(evaluation.batch_size), side, side, 3), "f4")
    jax.eval_shape(lambda images: models.build(model, placement=placement)(images), images)
