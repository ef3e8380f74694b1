"""Opens a run before the first step: its data, its program, then its folder.

The first two write nothing, so a config, data or model that does not fit leaves no files.
"""

import contextlib
import dataclasses
import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import jax

from vmoe import distributed
from vmoe.checkpoints.restore import has_checkpoint
from vmoe.checkpoints.run import Checkpoints
from vmoe.config import TrainConfig, replace, to_json
from vmoe.data.crops import resizing_messages
from vmoe.data.sources import skipped_messages
from vmoe.data.unreadable import Refused, Unreadable
from vmoe.data.workers import Workers
from vmoe.host import forks
from vmoe.host.signals import Signals
from vmoe.train.check import Data, Program, open_data, padding_batch, plan_program
from vmoe.train.environment import environment, shared
from vmoe.train.folder import open_workdir
from vmoe.train.init import Init, InitFrom, messages, read_source
from vmoe.train.lr_factors import training_messages
from vmoe.train.profile import Profiler, parse_steps
from vmoe.train.report import Report
from vmoe.train.sinks import Sink
from vmoe.train.wandb_run import check_wandb
from vmoe.workdir.layout import LEFT_OUT, UNREADABLE
from vmoe.workdir.lock import lock_workdir


@dataclasses.dataclass(frozen=True)
class Run:
    """Everything that the loop needs."""

    config: TrainConfig
    """Its length is in steps."""
    workdir: Path
    data: Data
    program: Program
    initial: Init | None
    """Parameters to start from, if there is no checkpoint."""
    extended: bool
    """Whether the config in the folder has fewer steps; only the primary process knows."""
    workers: Workers
    """The processes that read batches."""
    signals: Signals
    checkpoints: Checkpoints
    report: Report
    profiler: Profiler
    replaced: Unreadable
    """Training images that could not be read."""
    refused: Refused
    """Training images that the fast decoder did not support."""
    left_out: Unreadable
    """Images of the evaluation sets that could not be read."""


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
    sinks: Sequence[Sink] = (),
    **others: Any,
) -> Iterator[Run]:
    """Checks that everything fits, then locks the run folder and opens its files.

    Nothing is written before the config, the data and the model are known to fit, and to be the
    same in all processes.

    Args:
        sinks: see ``train``.
        others: further options that have to be the same in all processes.
    """
    forks.computes()
    # Each process may read with as many workers as its host has cores for.
    given = json.loads(to_json(replace(config, data=dict(num_workers=None))))
    given |= {"profile": profile, "wandb": wandb, **others}
    share = distributed.share_of_host()

    def check() -> tuple[
        TrainConfig, tuple[int, int] | None, Data, Program, Init | None, dict[str, Any]
    ]:
        """Opens the data and plans the program; uses no collective."""
        if wandb is not None:
            check_wandb(workdir, wandb)
        if not has_checkpoint(workdir):
            config.optim.check_decay()
        data = open_data(config)
        sized = config.with_steps(len(data.source))
        traced_steps = parse_steps(profile, sized.total_steps)
        program = plan_program(sized, data, mesh=mesh, fsdp=fsdp, share=share)
        initial = read_source(init, workdir, sized.model)
        return sized, traced_steps, data, program, initial, environment(data, program.placement)

    config, traced_steps, data, program, initial, now = distributed.raise_together(check)
    record = None if initial is None else initial.record
    distributed.check_same(given | shared(now) | {"init": record})
    with (
        lock_workdir(workdir),
        Signals() as signals,
        Workers(program.num_workers, program.num_threads) as workers,
    ):
        changed, extended = open_workdir(workdir, config, data.source.class_names, now, initial)
        with (
            Checkpoints(
                workdir, every=config.checkpoint_every, keep_latest=config.keep_latest
            ) as checkpoints,
            distributed.raise_together(
                lambda: Report(
                    workdir,
                    config,
                    devices=program.placement.devices,
                    images=len(data.source),
                    wandb=wandb,
                    sinks=sinks,
                )
            ) as report,
            Profiler(workdir, traced_steps, report) as profiler,
            distributed.abort_on_error(),  # innermost: the contexts above wait for other processes
        ):
            for message in [*_first_messages(config, data, program, initial, workers), *changed]:
                report.log(message)
            if not distributed.is_single_process():
                # A collective times out on the slowest process, so all of them compile first.
                with report.compiling("the training step"):
                    first = padding_batch(config, data.source, program.placement)
                    program.train_step.lower(program.abstract_state, first).compile()
                    del first  # frees the memory of a batch
                with signals.at_once():
                    distributed.barrier()
            lists = [workdir / name for name in (UNREADABLE, LEFT_OUT)]
            unreadable, left_out = lists if distributed.is_primary() else (None, None)
            yield Run(
                config,
                workdir,
                data,
                program,
                initial=initial,
                extended=extended,
                workers=workers,
                signals=signals,
                checkpoints=checkpoints,
                report=report,
                profiler=profiler,
                replaced=Unreadable("replaced by another image", unreadable),
                refused=Refused(),
                left_out=Unreadable("left out of evaluations", left_out),
            )


def _first_messages(
    config: TrainConfig, data: Data, program: Program, initial: Init | None, workers: Workers
) -> Iterator[str]:
    """Messages to log before the first step."""
    source, placement = data.source, program.placement
    size, classes = config.model.image_size, len(source.class_names)
    keep_aspect = config.data.preprocessing.keep_aspect and config.data.crop_min_area is None
    kept = " by the shorter side and cropped" * keep_aspect
    sets = ", ".join(f"{len(each):,} {evaluation.name}" for evaluation, each in data.evaluations)
    yield (
        f"{len(source):,} images of {classes} classes ({config.model.num_classes} logits), resized "
        f"to {size} px{kept}, read by {workers}; {sets}"
    )
    if initial is not None:
        yield from messages(initial, source.class_names)
    yield from training_messages(config.optim, program.abstract_state.params)
    if placement.mesh is not None:
        share = config.batch_size // placement.devices
        yield (
            f"mesh {placement}: {placement.devices} devices, {jax.process_count()} processes; "
            f"each device has {share} images and forms groups among them"
        )
    if config.accumulate > 1:
        part = config.batch_size // config.accumulate
        yield (
            f"accumulate={config.accumulate}: parts of {part} images, one after another; groups "
            "are formed within a part"
        )
    if source.max_labels > 1 and config.loss == "softmax":
        yield (
            "some images have several labels, which share the target equally with loss=softmax; "
            "loss=sigmoid learns each class by itself"
        )
    logits = config.model.num_classes
    if logits > classes:
        yield f"the model has {logits} logits for {classes} classes; {logits - classes} are unused"
    yield from resizing_messages(source, size, keep_aspect=keep_aspect)
    probed = [own for each in data.fewshot for own in each.sources]
    yield from skipped_messages([source, *(each for _, each in data.evaluations), *probed])
    for each in data.fewshot:
        yield from each.messages
