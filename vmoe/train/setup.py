"""Checks and opens everything that a run needs, before the first step."""

import contextlib
import dataclasses
import functools
from collections.abc import Callable, Iterator
from pathlib import Path

import jax

from vmoe import distributed, models
from vmoe.checkpoints.run import Checkpoints
from vmoe.config import EvalConfig, Preprocessing, TrainConfig
from vmoe.data.pipeline import Batch, Read, empty_batch, training_batches
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
from vmoe.train.environment import environment
from vmoe.train.folder import open_workdir
from vmoe.train.init import Init, InitFrom, read_source
from vmoe.train.lr_factors import Params
from vmoe.train.messages import first_messages
from vmoe.train.profile import Profiler, parse_steps
from vmoe.train.report import NullReport, Report, make_report
from vmoe.train.state import State, abstract_state
from vmoe.train.step import Metrics, make_train_step
from vmoe.train.wandb_writer import check_wandb
from vmoe.workdir.lock import lock_workdir


@dataclasses.dataclass(frozen=True)
class Run:
    """Everything that a run needs."""

    config: TrainConfig
    workdir: Path
    placement: Placement
    batches: Batches[Read]
    """Training batches by number; only the shard of each that this process reads."""
    class_names: tuple[str, ...]
    workers: Workers
    """The processes that read."""
    replaced: Unreadable
    """Training images that could not be read."""
    refused: Refused
    """Training images that the fast decoder refused."""
    left_out: Unreadable
    """Images of the evaluation sets that could not be read."""
    evaluations: list[tuple[EvalConfig, Source]]
    fewshot: tuple[FewShotData, ...]
    train_step: Callable[[State, Batch], tuple[State, Metrics]]
    abstract_state: State
    """Shapes, dtypes and shardings of the state."""
    initial: Init | None
    """Parameters to start from, if there is no checkpoint."""
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
) -> Iterator[Run]:
    """Checks that everything fits, then locks the run folder and opens its files.

    Nothing is written before the config, the data and the model are known to fit.

    Raises:
        UsageError: the folder is another run's, the data does not fit the model, the model or the
            batch cannot be split over the devices, ``init`` has other parameters, ``profile`` is
            wrong, or W&B is not ready.
    """
    if wandb is not None:
        distributed.raise_together(functools.partial(check_wandb, workdir, wandb))
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
    train_step, shapes = make_train_step(config, placement), abstract_state(config, placement)
    rows = config.batch_size // shards
    empty = empty_batch(rows, source.max_labels, Preprocessing(config.model.image_size))
    first = placement.make_global_array(empty)
    jax.eval_shape(train_step, shapes, first)
    for each, data in evaluations:
        _check_evaluation(each, data, config, placement, shapes.params)
    if fewshot:
        model = models.with_params(config.model, shapes.params, placement=placement)
        check_fewshot(model, config.fewshot, config.preprocessing)
    check_shared_memory(config.data.num_workers, _largest_batch(config) // shards)
    initial = read_source(init, workdir, config.model)
    open_report = functools.partial(
        make_report, workdir, config, devices=placement.devices, wandb=wandb
    )
    with (
        lock_workdir(workdir),
        Signals() as signals,
        Workers(config.data.num_workers) as workers,
    ):
        measured = {each.name: own for each, own in evaluations}
        measured |= {f"few-shot {own.name}": own for each in fewshot for own in each.sources}
        now = environment(source, measured, placement)
        changed, extended = open_workdir(workdir, config, source.class_names, now, initial)
        with (
            Checkpoints(
                workdir, every=config.checkpoint_every, keep_latest=config.keep_latest
            ) as checkpoints,
            distributed.raise_together(open_report) as report,
            Profiler(workdir, traced_steps, report) as profiler,
            distributed.abort_on_error(),  # innermost: the contexts above wait for other processes
        ):
            for message in [
                *first_messages(
                    config, placement, source, evaluations, fewshot, initial, shapes.params
                ),
                *changed,
            ]:
                report.log(message)
            if not distributed.is_single_process():
                # A collective times out on the slowest process, so all of them compile first.
                train_step.lower(shapes, first).compile()
                with signals.at_once():
                    distributed.barrier("compiled")
            del first  # frees the memory of a batch
            yield Run(
                config=config,
                workdir=workdir,
                placement=placement,
                batches=batches,
                class_names=source.class_names,
                workers=workers,
                replaced=Unreadable("replaced by another image"),
                refused=Refused(),
                left_out=Unreadable("left out of evaluations"),
                evaluations=evaluations,
                fewshot=fewshot,
                train_step=train_step,
                abstract_state=shapes,
                initial=initial,
                extended=extended,
                signals=signals,
                checkpoints=checkpoints,
                report=report,
                profiler=profiler,
            )


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
