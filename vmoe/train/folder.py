"""The run folder: writes a new run's metadata, or checks the folder of a resumed run."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from vmoe import distributed
from vmoe.checkpoints.restore import has_checkpoint
from vmoe.config import TrainConfig, replace
from vmoe.config.changes import MAY_CHANGE, OF_IMAGES, Change, changes
from vmoe.costs.summary import summarize
from vmoe.errors import Failure, UsageError, writing
from vmoe.train.environment import differences, same_images, with_new_sets
from vmoe.train.init import Init
from vmoe.train.optim import schedule
from vmoe.train.sinks import CsvFile
from vmoe.workdir.layout import (
    CLASSES,
    OF_ONE_RUN,
    change,
    files_of_a_run,
    finish_change,
    has_config,
    read_class_names,
    read_config,
    read_environment,
    read_init,
    set_aside,
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

    Fields that may change are changed in the folder, see ``vmoe.config.changes``. The files of a
    run of another config that has no checkpoint are renamed.

    Args:
        now: the current environment.

    Returns:
        messages about changes since the start of the run, and whether it has more steps.
    """

    def open_folder() -> tuple[list[str], bool]:
        if not distributed.is_primary():
            return [], False
        lines = []
        if has_config(workdir):
            with writing(workdir):
                finish_change(workdir)
            stored, before = read_config(workdir), read_environment(workdir)
            _check_checkpoints(workdir, stored, config)
            found = changes(stored, config)
            problem = (
                _other_config(stored, config, found, before, now)
                or _other_classes(workdir, class_names)
                or _other_init(workdir, initial)
            )
            if not problem:
                # The length changes with the first checkpoint, see ``extend``.
                current = replace(config, steps=stored.steps)
                lines = _changed(workdir, current, found, before, now)
                extended = stored.total_steps < config.total_steps
                return lines + [_extension(config, stored.total_steps)] * extended, extended
            if has_checkpoint(workdir):
                raise UsageError(f"workdir {workdir} {problem}").remedied_by(workdir=None)
            with writing(workdir):
                kept = ", ".join(filter(None, (set_aside(workdir / name) for name in OF_ONE_RUN)))
            held = problem.rpartition(":")[0]
            lines = [f"{workdir} {held}; it has no checkpoint, so its files are kept as {kept}"]
        elif left := files_of_a_run(workdir):
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
        return lines, False

    return distributed.raise_together(open_folder)


def _other_config(
    stored: TrainConfig,
    config: TrainConfig,
    found: Sequence[Change],
    before: dict[str, Any],
    now: dict[str, Any],
) -> str:
    """Why the config is not that of the run; empty if it is.

    Args:
        found: the fields that differ.
        before: the environment of the run.
    """
    moved = [each for each in found if each.key in OF_IMAGES]
    other = [
        f"{each.field} is {each.before} there and {each.now} here"
        + ", of other images" * (each in moved)
        for each in found
        if each.key not in MAY_CHANGE or (each in moved and not same_images(each, before, now))
    ]
    if config.total_steps < stored.total_steps:
        other.append(f"steps is {stored.total_steps} there and {config.total_steps} here")
    there, here = (each.total_steps * each.batch_size for each in (stored, config))
    epochs, images = "", now.get("images")
    if images and there != here:
        epochs = f" ({there / images:.4g} and {here / images:.4g} epochs)"
    text = f"holds a run of another config ({'; '.join(other)}){epochs}: "
    return text + "use the config of that run, or another workdir" if other else ""


def _other_classes(workdir: Path, class_names: tuple[str, ...]) -> str:
    text = "holds a run with other classes of the training data"
    same = tuple(read_class_names(workdir)) == class_names
    return "" if same else f"{text} ({workdir / CLASSES}): use another workdir"


def _other_init(workdir: Path, initial: Init | None) -> str:
    """Empty if the run has a checkpoint, with which ``initial`` is None."""
    recorded = read_init(workdir)
    if initial is None or initial.record == recorded:
        return ""
    began = "random parameters" if recorded is None else recorded["path"]
    now = initial.record["path"]
    return f"holds a run that began from {began}, not from {now}: use another workdir"


def _changed(
    workdir: Path,
    current: TrainConfig,
    found: Sequence[Change],
    before: dict[str, Any],
    now: dict[str, Any],
) -> list[str]:
    """Changes the folder's config, and returns messages about this, the machine and the data."""
    lines = [str(each) for each in found]
    if found:
        with writing(workdir):
            change(workdir, current, with_new_sets(before, now), lines)
    return [f"{workdir}: {line}" for line in [*lines, *differences(before, now)]]


def _check_checkpoints(workdir: Path, stored: TrainConfig, config: TrainConfig) -> None:
    """Checks that a folder without a checkpoint had none, by its rows.

    Raises:
        Failure: checkpoints are lost; a kill loses the first one at most.
    """
    if has_checkpoint(workdir):
        return
    last = CsvFile(workdir / "metrics.csv").stored_step()
    if last > 2 * max(stored.checkpoint_every, config.checkpoint_every):
        raise Failure(
            f"{workdir}: metrics.csv has rows up to step {last}, but there is no checkpoint: "
            "restore the checkpoints, or use another workdir"
        ).remedied_by(workdir=None)


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
