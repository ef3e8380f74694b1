"""The checkpoints of a run: ``checkpoints/STEP/``, items of arrays and a checksum of each.

    params     the parameters       ema         their moving average, if the run has one
    training   all other state      checksums   of every array, by item and name; format version;
                                                how much of the run's other files was written

The parameters are a separate item, so a model loads without the optimiser state. Orbax writes to a
temporary folder and renames it, so every step was complete when written; the checksums detect later
corruption. Each process writes the shards that it holds, and any number of processes on any devices
can read them. ``checkpoints/metrics.json`` holds the metrics recorded for each step.

A step is saved if it is a multiple of ``every``, or if its evaluation is the best so far. Of these
multiples the newest are kept; of all steps the best one by recorded accuracy, and the last one.
"""

import hashlib
import json
import re
import shutil
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import orbax.checkpoint as ocp
from orbax.checkpoint.checkpoint_managers import preservation_policy

from vmoe import distributed
from vmoe.checkpoints.checksums import checksums
from vmoe.checkpoints.quiet import hide_late_reports
from vmoe.errors import Failure, UsageError
from vmoe.workdir.layout import CHECKPOINTS, has_config, replace_text, steps_of

Arrays = Any  # a tree of arrays
Metrics = dict[str, float]

FORMAT = 2
DELETED, CORRUPT = "deleted", "corrupt"  # sub-folders of checkpoints/


class CorruptCheckpoint(Exception):
    """A checkpoint that cannot be trusted; the message names the array or the file."""


class Restored(NamedTuple):
    """A checkpoint of a run.

    Attributes:
        step: number of training steps.
        items: trees of arrays, by item.
        files: what was saved with it about other files of the run, by name.
        messages: about each newer step, which is corrupt and was moved away.
    """

    step: int
    items: dict[str, Arrays]
    files: dict[str, Sequence[Any]]
    messages: list[str]


class Checkpoints:
    """The checkpoints of a run folder; a context manager that waits for all writes on exit."""

    def __init__(self, workdir: Path, *, every: int, keep_latest: int):
        """Opens the checkpoints of a run folder.

        Args:
            every: its multiples are the scheduled steps; other steps were saved at a stop or at the
                end of the run.
            keep_latest: number of newest scheduled steps to keep.

        Raises:
            Failure: the recorded metrics cannot be read.
        """
        hide_late_reports()
        self._workdir = workdir
        self._folder = (workdir / CHECKPOINTS).absolute()
        self._every, self._keep_latest = every, keep_latest
        self._metrics = _read_metrics(workdir)
        self._saved = 0  # the last step saved or restored
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
        return sorted(self._manager.all_steps())

    def save(
        self, step: int, files: Mapping[str, Sequence[Any]] | None = None, **items: Arrays
    ) -> bool:
        """Starts to write a step, unless it was the last one saved or restored.

        The arrays are copied first, so the caller may donate them.

        Args:
            files: JSON to keep with the step about other files of the run, by name.
            items: trees of arrays.

        Returns:
            whether it is written.

        Raises:
            Failure: this step or the previous one cannot be written.
        """
        if step == self._saved:
            return False
        self.wait()
        self._check_room(items)
        arguments: dict[str, Any] = {
            name: ocp.args.StandardSave(item) for name, item in items.items()
        }
        arrays = checksums(items)
        index: dict[str, Any] = {"format": FORMAT, "files": files or {}, "arrays": arrays}
        index["sha256"] = _sha256(index)
        arguments["checksums"] = ocp.args.JsonSave(index)
        self._guard(lambda: self._manager.save(step, args=ocp.args.Composite(**arguments)))
        self._saved = step
        return True

    def record(self, step: int, metrics: Metrics) -> None:
        """Records the metrics of a step, before or after it is saved; they determine the best step.

        Raises:
            Failure: they cannot be written.
        """
        self._metrics[step] = metrics
        if distributed.is_primary():
            text = json.dumps(self._metrics, indent=2)
            self._guard(lambda: replace_text(_metrics_file(self._workdir), text))

    def is_best(self, step: int) -> bool:
        """Whether the accuracy recorded for a step is the highest up to it."""
        return _best(self._metrics, [other for other in self._metrics if other <= step]) == step

    def wait(self) -> None:
        """Waits until the last save is on the disk.

        Raises:
            Failure: it cannot be written.
        """
        self._guard(self._manager.wait_until_finished)
        self._remove_deleted()

    def restore_newest(self, **target: Arrays) -> Restored:
        """Restores the newest step whose arrays all match their checksums.

        Newer steps that do not match are moved to ``checkpoints/corrupt``.

        Args:
            target: arrays or their shapes, with the shardings to restore to, by item.

        Raises:
            Failure: no step is valid.
        """
        messages = []
        for step in reversed(self.steps):
            try:
                items, files = _restore(self._folder / str(step), target)
                self._saved = step
                return Restored(step, items, files, messages)
            except CorruptCheckpoint as error:
                moved = f"{CHECKPOINTS}/{CORRUPT}/{step}"
                messages.append(f"checkpoint {step} is corrupt ({error}); moved to {moved}")
            distributed.raise_together(lambda step=step: self._move_to_corrupt(step))
            self._manager.close()
            self._manager = self._open()
        raise distributed.synchronized(_all_corrupt(self._workdir, messages))

    def delete_unscheduled(self) -> None:
        """Deletes the steps that come after the newest scheduled one."""
        self.wait()
        scheduled = [step for step in self.steps if step % self._every == 0]
        for step in self.steps:
            if step > max(scheduled, default=0):
                self._manager.delete(step)
        self.wait()

    def _open(self) -> ocp.CheckpointManager:
        self._remove_deleted()
        options = ocp.CheckpointManagerOptions(
            preservation_policy=_NewestAndBest(self._every, self._keep_latest, self._metrics),
            cleanup_tmp_directories=True,
            todelete_subdir=DELETED,  # renamed first, so a kill never leaves half of a step
            enable_async_checkpointing=True,
        )
        return ocp.CheckpointManager(self._folder, options=options)

    def _remove_deleted(self) -> None:
        if distributed.is_primary():
            shutil.rmtree(self._folder / DELETED, ignore_errors=True)

    def _move_to_corrupt(self, step: int) -> None:
        if not distributed.is_primary():
            return
        folder = self._folder / CORRUPT
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
            f"{self._folder}: a checkpoint cannot be written ({cause}); {last}. Free some space "
            "and run the same command to resume"
        ) from (reason if isinstance(reason, Exception) else None)


class _NewestAndBest(preservation_policy.PreservationPolicy):
    """Keeps the newest scheduled steps, the best one and the last one."""

    def __init__(self, every: int, keep_latest: int, metrics: dict[int, Metrics]):
        self._every, self._keep_latest, self._metrics = every, keep_latest, metrics

    def should_preserve(self, checkpoints: Sequence[Any], *, context: Any) -> Sequence[bool]:
        steps = [checkpoint.step for checkpoint in checkpoints]
        scheduled = sorted(step for step in steps if step % self._every == 0)
        kept = {*scheduled[-self._keep_latest :], max(steps), _best(self._metrics, steps)}
        return [step in kept for step in steps]


def has_checkpoint(workdir: Path) -> bool:
    """Whether a run folder has a checkpoint, valid or corrupt."""
    return bool(steps_of(workdir)) or (workdir / CHECKPOINTS / CORRUPT).exists()


def is_run(path: Path) -> bool:
    """Whether a path names a run folder, or a step in one; see ``find``."""
    return has_config(_split(path)[0])


def find(path: Path) -> tuple[Path, list[int]]:
    """The run folder of a path, and the steps that the path may refer to, ascending.

    Args:
        path: a run folder, or its ``checkpoints/STEP``, ``checkpoints/best``, ``checkpoints/last``.

    Raises:
        UsageError: there is no such checkpoint.
        Failure: all checkpoints of the run are corrupt.
    """
    workdir, name = _split(path)
    steps = steps_of(workdir)
    if not steps and has_checkpoint(workdir):
        raise _all_corrupt(workdir)
    if not steps:
        raise UsageError(f"{workdir}: no checkpoint yet; training writes one")
    best = _best(_read_metrics(workdir), steps)
    named = {"": steps, "last": steps[-1:]} | ({} if best is None else {"best": [best]})
    if name.isdigit() and int(name) in steps:
        return workdir, [int(name)]
    if name not in named:
        known = ", ".join([*map(str, steps), *filter(None, named)])
        raise UsageError(f"{path}: no such checkpoint; choose from {known}")
    return workdir, named[name]


def _split(path: Path) -> tuple[Path, str]:
    """The run folder of a path, and the part after ``checkpoints/``, if any."""
    if path.parent.name == CHECKPOINTS:
        return path.parent.parent, path.name
    return path, ""


def restore(folder: Path, **target: Arrays) -> dict[str, Arrays]:
    """Restores items of a step by name, and verifies their checksums.

    Args:
        folder: ``checkpoints/STEP``.
        target: arrays or their shapes, with the shardings to restore to, by item.

    Raises:
        CorruptCheckpoint: a file is missing or truncated, or an array differs from the one written.
        Failure: the checkpoint has another format version.
    """
    return _restore(folder, target)[0]


def _restore(
    folder: Path, target: dict[str, Arrays]
) -> tuple[dict[str, Arrays], dict[str, Sequence[Any]]]:
    """The items of a step, and what was saved with it about other files."""
    hide_late_reports()
    items, index, message = {}, {}, ""
    path: Any = folder.absolute()  # Orbax annotates its own path type, but takes any
    try:
        index = ocp.JsonCheckpointHandler().restore(path / "checksums")
        _check_index(folder, index)
        items = {name: _restore_item(path / name, item) for name, item in target.items()}
    except (Failure, MemoryError, PermissionError):
        raise  # these do not mean that the checkpoint is corrupt
    except Exception as error:  # Orbax and TensorStore report corruption by errors of many types
        if any(word in str(error) for word in ("RESOURCE_EXHAUSTED", "PERMISSION_DENIED")):
            raise
        message = _reason(error)
    if message := distributed.first_message(message):
        raise CorruptCheckpoint(message)
    local = not any(leaf.sharding for leaf in jax.tree.leaves(target))
    for name, checksum in checksums(items, local=local).items():
        if index["arrays"].get(name) != checksum:
            raise CorruptCheckpoint(f"the checksum of {name} differs from the one written")
    return items, index["files"]


def _reason(error: Exception) -> str:
    """A few words about an error of Orbax or TensorStore: the file that it names, if any."""
    text = " ".join(str(error).split())
    paths = re.findall(r"[\w.-]*/[\w./-]+", text)
    if paths:
        return f"{Path(paths[-1]).name} unreadable"
    return text.split(" [")[0].split(": ")[-1][:100] or type(error).__name__


def _all_corrupt(workdir: Path, messages: Sequence[str] = ()) -> Failure:
    moved = workdir / CHECKPOINTS / CORRUPT
    return Failure(
        f"{workdir}: {'; '.join([*messages, 'every checkpoint is corrupt'])} (moved to {moved}); "
        "use a new run folder, or delete this one to start over"
    )


def _check_index(folder: Path, index: Any) -> None:
    """Checks the item ``checksums``: its own checksum and its format version.

    All processes read the same file, so they raise the same error.
    """
    if not isinstance(index, dict):
        raise ValueError("its checksums have changed")
    sealed = "sha256" in index or index.get("format") == FORMAT  # format 1 had no seal
    if sealed and index.pop("sha256", None) != _sha256(index):
        raise ValueError("its checksums have changed")
    if (version := index.get("format")) != FORMAT:
        raise distributed.synchronized(
            Failure(
                f"{folder}: checkpoint format {version}, this version of vmoe reads {FORMAT}; use "
                "the version that wrote it, or another workdir"
            )
        )


def _sha256(index: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(index, sort_keys=True).encode()).hexdigest()


def _restore_item(path: Any, target: Arrays) -> Arrays:
    """Restores an item with its handler; a Checkpointer would wait for a process that failed."""
    handler = ocp.StandardCheckpointHandler()
    return handler.restore(path, args=ocp.args.StandardRestore(jax.tree.map(_abstract, target)))


def _abstract(leaf: jax.Array | jax.ShapeDtypeStruct) -> jax.ShapeDtypeStruct:
    sharding = leaf.sharding or jax.sharding.SingleDeviceSharding(jax.local_devices()[0])
    return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding)


def _best(metrics: dict[int, Metrics], steps: Iterable[int]) -> int | None:
    """The step of the highest recorded accuracy, the latest one on ties; None if none is known."""
    known = [step for step in steps if "accuracy" in metrics.get(step, {})]
    return max(known, key=lambda step: (metrics[step]["accuracy"], step), default=None)


def _metrics_file(workdir: Path) -> Path:
    return workdir / CHECKPOINTS / "metrics.json"


def _read_metrics(workdir: Path) -> dict[int, Metrics]:
    path = _metrics_file(workdir)
    try:
        metrics = json.loads(path.read_text())
        return {
            int(step): {name: float(value) for name, value in values.items()}
            for step, values in metrics.items()
        }
    except FileNotFoundError:
        return {}
    except (ValueError, AttributeError, TypeError) as error:
        raise Failure(
            f"{path} is corrupt ({error}): restore it, or remove it, which loses the choice of "
            "the best checkpoint"
        ) from None
