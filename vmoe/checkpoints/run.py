"""The checkpoints of a run: ``checkpoints/STEP/``, items of arrays and a checksum of each.

    params     the parameters       ema         their moving average, if the run has one
    training   all other state      checksums   of every array, by item and name; format version;
                                                the step; how much of the run's other files was
                                                written

The parameters are a separate item, so a model loads without the optimizer state. Orbax writes to a
temporary folder and renames it, so every step was complete when written; the checksums detect later
corruption. Each process writes the shards that it holds, and any number of processes on any devices
can read them. ``checkpoints/metrics.json`` holds the metrics recorded for each step.

A step is saved if it is a multiple of ``every`` (a scheduled step), if its evaluation is the best
so far or fails, when the run is stopped, and at its end. The newest scheduled steps, the step with
the best recorded accuracy and the last step are kept.
"""

import json
import shutil
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import orbax.checkpoint as ocp
from orbax.checkpoint.checkpoint_managers import preservation_policy

from vmoe import distributed
from vmoe.checkpoints.checksums import checksums
from vmoe.checkpoints.orbax_logging import hide_late_reports
from vmoe.checkpoints.restore import (
    CORRUPT,
    FORMAT,
    Arrays,
    CorruptCheckpoint,
    Metrics,
    all_corrupt,
    best_step,
    metrics_file,
    read_metrics,
    restore_with_files,
    sha256_of,
)
from vmoe.errors import Failure, writing
from vmoe.workdir.layout import CHECKPOINTS, replace_text, steps_of

DELETED = "deleted"  # a sub-folder of checkpoints/


class Restored(NamedTuple):
    """A checkpoint of a run.

    Attributes:
        step: number of training steps.
        items: trees of arrays, by item.
        files: the values saved with it about other files of the run, by name.
        messages: one about each newer step, which is corrupt and was moved away.
    """

    step: int
    items: dict[str, Arrays]
    files: dict[str, Sequence[Any]]
    messages: list[str]


class Checkpoints:
    """The checkpoints of a run folder; a context manager that waits for all writes on exit.

    A method raises a Failure if the disk cannot be written, or if no step is valid.
    """

    def __init__(self, workdir: Path, *, every: int, keep_latest: int):
        """Opens the checkpoints of a run folder.

        Args:
            every: its multiples are the scheduled steps; other steps were saved as the best so
                far, at a stop or at the end of the run.
            keep_latest: number of newest scheduled steps to keep.
        """
        hide_late_reports()
        self._workdir = workdir
        self._folder = (workdir / CHECKPOINTS).absolute()
        self._every, self._keep_latest = every, keep_latest
        recorded = distributed.from_primary(lambda: read_metrics(workdir))
        self._metrics: dict[int, Metrics] = {int(step): recorded[step] for step in recorded}
        self.saved = 0  # the last step saved or restored
        self._manager = self._open()

    def __enter__(self) -> "Checkpoints":
        return self

    def __exit__(self, kind: type[BaseException] | None, *exception: object) -> None:
        try:
            self.wait()
            self._manager.close()
        except (Failure, OSError, ValueError):
            if kind is None:  # otherwise the first error is reported
                raise

    @property
    def steps(self) -> list[int]:
        """All steps, ascending."""
        return sorted(map(int, self._manager.all_steps()))  # broadcast as NumPy integers

    def save(
        self, step: int, files: Mapping[str, Sequence[Any]] | None = None, **items: Arrays
    ) -> None:
        """Starts to write a step, which is not the last one saved or restored.

        The arrays are copied first, so the caller may donate them.

        Args:
            files: JSON values about other files of the run, by name, to save with the step.
        """
        self.wait()
        self._check_room(items)
        arguments: dict[str, Any] = {
            name: ocp.args.StandardSave(item) for name, item in items.items()
        }
        arrays = checksums(items)
        index: dict[str, Any] = dict(format=FORMAT, step=step, files=files or {}, arrays=arrays)
        index["sha256"] = sha256_of(index)
        arguments["checksums"] = ocp.args.JsonSave(index)
        self._guard(lambda: self._manager.save(step, args=ocp.args.Composite(**arguments)))
        self.saved = step

    def record(self, step: int, metrics: Metrics) -> None:
        """Records the metrics of a step, also after it is saved; they determine the best step."""
        self._metrics[step] = metrics
        if distributed.is_primary():
            text = json.dumps(self._metrics, indent=2)
            self._guard(lambda: replace_text(metrics_file(self._workdir), text))

    def is_best(self, step: int) -> bool:
        """Whether the accuracy recorded for a step is the highest up to it."""
        return best_step(self._metrics, [other for other in self._metrics if other <= step]) == step

    def wait(self) -> None:
        """Waits until the last save is on the disk."""
        self._guard(self._manager.wait_until_finished)
        self._remove_deleted()

    def restore_newest(self, **target: Arrays) -> Restored:
        """Restores the newest step whose arrays all match their checksums.

        Newer steps that do not match are moved to ``checkpoints/corrupt``.
        """
        messages = []
        for step in reversed(self.steps):
            try:
                items, files = restore_with_files(self._folder / str(step), target)
                self.saved = step
                return Restored(step, items, files, messages)
            except CorruptCheckpoint as error:
                moved = f"{CHECKPOINTS}/{CORRUPT}/{step}"
                messages.append(f"checkpoint {step} is corrupt ({error}); moved to {moved}")
            distributed.raise_together(lambda step=step: self._move_to_corrupt(step))
            self._manager.close()
            self._manager = self._open()
        raise distributed.synchronized(all_corrupt(self._workdir, messages))

    def delete_unscheduled(self, keep: int = 0) -> None:
        """Deletes the steps that come after the newest scheduled one, and after ``keep``."""
        self.wait()
        scheduled = [step for step in self.steps if step % self._every == 0]
        for step in self.steps:
            if step > max([keep, *scheduled]):
                self._manager.delete(step)
        self.saved = 0  # it may be deleted; the next one is restored or saved
        self.wait()

    def _open(self) -> ocp.CheckpointManager:
        self._remove_deleted()
        options = ocp.CheckpointManagerOptions(
            preservation_policy=_NewestAndBest(self._every, self._keep_latest, self._metrics),
            cleanup_tmp_directories=True,
            todelete_subdir=DELETED,  # renamed first, so a kill never leaves half of a step
            enable_async_checkpointing=True,
            single_host_load_and_broadcast=True,  # another host may see an earlier list
        )
        return ocp.CheckpointManager(self._folder, options=options)

    def _remove_deleted(self) -> None:
        if distributed.is_primary():
            shutil.rmtree(self._folder / DELETED, ignore_errors=True)

    def _move_to_corrupt(self, step: int) -> None:
        if not distributed.is_primary():
            return
        folder = self._folder / CORRUPT
        with writing(folder, remedy="run the same command to resume"):
            folder.mkdir(exist_ok=True)
            shutil.rmtree(folder / str(step), ignore_errors=True)
            (self._folder / str(step)).rename(folder / str(step))

    def _check_room(self, items: Arrays) -> None:
        """Raises a Failure if the disk has no room for a checkpoint."""
        size = sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(items))
        free = shutil.disk_usage(self._folder).free
        if free < size:
            self._fail(f"it needs {size:,} bytes, the disk has {free:,} left")

    def _guard(self, write: Callable[[], Any]) -> None:
        try:
            write()
        except (OSError, ValueError) as error:
            self._fail(error)

    def _fail(self, reason: Exception | str) -> None:
        for unfinished in (
            self._folder.glob("*.orbax-checkpoint-tmp") if distributed.is_primary() else ()
        ):
            shutil.rmtree(unfinished, ignore_errors=True)
        steps = steps_of(self._workdir)
        last = f"checkpoint {steps[-1]} is kept" if steps else "there is no earlier one"
        # TensorStore reports a chain of errors, the cause last.
        cause = getattr(reason, "strerror", None) or str(reason).split(": ")[-1].split(" [")[0]
        raise Failure(
            f"{self._folder}: a checkpoint cannot be written ({cause}); {last}. Once that "
            "is resolved, run the same command to resume"
        ) from (reason if isinstance(reason, Exception) else None)


class _NewestAndBest(preservation_policy.PreservationPolicy):
    """Keeps the newest scheduled steps, the best one and the last one."""

    def __init__(self, every: int, keep_latest: int, metrics: dict[int, Metrics]):
        self._every, self._keep_latest, self._metrics = every, keep_latest, metrics

    def should_preserve(self, checkpoints: Sequence[Any], *, context: Any) -> Sequence[bool]:
        steps = [checkpoint.step for checkpoint in checkpoints]
        scheduled = sorted(step for step in steps if step % self._every == 0)
        kept = {*scheduled[-self._keep_latest :], max(steps), best_step(self._metrics, steps)}
        return [step in kept for step in steps]
