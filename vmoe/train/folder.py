"""The run folder: writes a new run's metadata, or checks the folder of a resumed run."""

from pathlib import Path
from typing import Any

import numpy as np

from vmoe import distributed
from vmoe.config import TrainConfig
from vmoe.costs.summary import summarize
from vmoe.errors import UsageError, writing
from vmoe.train.environment import differences
from vmoe.train.init import Init
from vmoe.train.optim import schedule
from vmoe.workdir.layout import (
    check_same_run,
    files_of_a_run,
    has_config,
    read_environment,
    write_metadata,
)


def open_workdir(
    workdir: Path,
    config: TrainConfig,
    class_names: tuple[str, ...],
    now: dict[str, Any],
    initial: Init | None,
) -> tuple[list[str], bool]:
    """Writes the metadata of a new run, or checks that the folder holds this one.

    Args:
        now: the current environment.

    Returns:
        messages about changes since the start of the run, and whether it has more steps.
    """

    def open_folder() -> tuple[list[str], bool]:
        if not distributed.is_primary():
            return [], False
        if has_config(workdir):
            steps, changes = check_same_run(workdir, config, class_names, images=now.get("images"))
            changes += differences(read_environment(workdir), now)
            lines = [f"{workdir}: {line}" for line in changes]
            if steps is not None:
                lines.append(_extension(config, steps))
            return lines, steps is not None
        if left := files_of_a_run(workdir):
            raise UsageError(
                f"workdir {workdir}: it has {left[0]} but no config.json, so its run is unknown: "
                "restore config.json, or use another workdir"
            ).remedied_by(workdir=None)
        summary = summarize(config.model, title="model")
        with writing(workdir):
            write_metadata(
                workdir,
                config,
                class_names,
                environment=now,
                model=summary,
                init=None if initial is None else initial.record,
            )
        return [], False

    return distributed.raise_together(open_folder)


def _extension(config: TrainConfig, steps: int) -> str:
    """A message about a run of ``steps`` steps that is extended."""
    message = f"extended from {steps} to {config.steps} steps"
    then, now = (
        float(np.asarray(schedule(config.optim, length)(steps)))
        for length in (steps, config.total_steps)
    )
    if then != now:
        message += (
            f"; the {config.optim.schedule} schedule now ends at step {config.steps}, so the "
            f"learning rate at step {steps} is {now:.3g} instead of {then:.3g}"
        )
    return message
