"""Opens everything that a run needs, before the first step."""

import contextlib
import dataclasses
import functools
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from vmoe import distributed
from vmoe.checkpoints.run import Checkpoints
from vmoe.config import TrainConfig, replace, to_json
from vmoe.data.problems import Refused, Unreadable
from vmoe.data.workers import Workers
from vmoe.signals import Signals
from vmoe.train.check import Checked, check, padding_batch
from vmoe.train.environment import shared
from vmoe.train.folder import open_workdir
from vmoe.train.init import InitFrom
from vmoe.train.messages import first_messages
from vmoe.train.profile import Profiler
from vmoe.train.report import Report
from vmoe.workdir.lock import lock_workdir


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
    """Whether the config in the folder has fewer steps; only the primary process knows."""
    signals: Signals
    checkpoints: Checkpoints
    report: Report
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
    checked = distributed.raise_together(
        lambda: check(
            config, workdir, init=init, mesh=mesh, fsdp=fsdp, profile=profile, wandb=wandb
        )
    )
    options = {"profile": profile, "wandb": wandb, **others}
    record = None if checked.initial is None else checked.initial.record
    # Each process may read with as many workers as its host has cores for.
    fields = json.loads(to_json(replace(config, data=dict(num_workers=0))))
    distributed.check_same(fields | options | shared(checked.environment) | {"init": record})
    config = checked.config
    open_report = functools.partial(
        Report, workdir, config, devices=checked.placement.devices, wandb=wandb
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
            for message in [*first_messages(checked), *changed]:
                report.log(message)
            if not distributed.is_single_process():
                # A collective times out on the slowest process, so all of them compile first.
                first = padding_batch(config, checked.source, checked.placement)
                checked.train_step.lower(checked.abstract_state, first).compile()
                del first  # frees the memory of a batch
                with signals.at_once():
                    distributed.barrier()
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
