"""The checkpoints of a run: ``checkpoints/STEP/`` with items of arrays and a checksum of each.

    params     the parameters       ema         their moving average, where the run keeps one
    training   all other state      checksums   of every array, by item and name

The parameters are an item of their own, so that a model loads without the optimiser's moments.
Orbax writes beside and renames, so a step that exists was once whole; whether it still is, the
checksums tell. Each process writes the parts of arrays that it holds; read is on any devices, in
any number of processes. Kept are the newest steps, and the best by the first evaluation set.
"""

import csv
import functools
import re
import shutil
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import jax
import orbax.checkpoint as ocp
from orbax.checkpoint.checkpoint_managers import preservation_policy

from vmoe import distributed
from vmoe.checkpoints.checksums import checksums
from vmoe.errors import Failure, UsageError
from vmoe.workdir.layout import steps_of

Arrays = Any  # a tree of arrays


DELETED, DAMAGED = "deleted", "damaged"  # below checkpoints/: on their way out; set aside


class CorruptCheckpoint(Exception):
    """A checkpoint that cannot be trusted; the message names the array or the file."""


class Checkpoints:
    """The checkpoints below a run folder; a context manager that ends with all writes done."""

    def __init__(self, workdir: Path, *, every: int, keep: int):
        """A step that ``every`` divides is due; others are of a run that was stopped.

        ``keep``: how many of the newest steps due are kept, beside the best and the last one.
        """
        self._workdir = workdir
        self._folder = (workdir / "checkpoints").absolute()
        self._every, self._keep = every, keep
        self._manager = self._open()

    def __enter__(self) -> "Checkpoints":
        return self

    def __exit__(self, kind: type[BaseException] | None, *exception: object) -> None:
        try:
            self.wait()
            self._manager.close()
        except (Failure, OSError, ValueError):
            if kind is None:  # else what went wrong first is the thing to tell
                raise

    @property
    def steps(self) -> list[int]:
        """All steps, oldest first."""
        return sorted(self._manager.all_steps())

    def save(self, step: int, **items: Arrays) -> None:
        """Starts to write a step; a copy is taken at once, so that the arrays may be donated.

        Raises:
            Failure: this step or the one before cannot be written.
        """
        self.wait()
        self._check_room(items)
        save: dict[str, Any] = {name: ocp.args.StandardSave(item) for name, item in items.items()}
        save["checksums"] = ocp.args.JsonSave(checksums(items))
        try:
            self._manager.save(step, args=ocp.args.Composite(**save))
        except (OSError, ValueError) as error:
            self._failed(error)

    def wait(self) -> None:
        """Until the last save is on the disk.

        Raises:
            Failure: it cannot be written.
        """
        try:
            self._manager.wait_until_finished()
        except (OSError, ValueError) as error:
            self._failed(error)
        self._remove_deleted()

    def restore_newest(self, **like: Arrays) -> tuple[int, dict[str, Arrays], list[str]]:
        """The newest step whose arrays all have their checksums.

        Newer ones that have not are set aside, under ``checkpoints/damaged``.

        Returns:
            the step, its items by name, and a line about each that was set aside.

        Raises:
            Failure: no step is good.
        """
        told = []
        for step in reversed(self.steps):
            try:
                return step, restore(self._folder / str(step), **like), told
            except CorruptCheckpoint as damage:
                told.append(f"checkpoint {step} is damaged ({damage}), it lies in {DAMAGED}/ now")
            distributed.raise_together(functools.partial(self._set_aside, step))
            self._manager.close()
            self._manager = self._open()
        told = told or ["those there were are damaged"]
        raise distributed.synchronized(
            Failure(
                f"{self._workdir}: no checkpoint is good; {'; '.join(told)}. They lie in "
                f"{self._folder / DAMAGED}: use another --workdir, or remove this one to begin anew"
            )
        )

    @property
    def begun(self) -> bool:
        """Whether there ever was a checkpoint, good or damaged."""
        return bool(self.steps) or (self._folder / DAMAGED).exists()

    def delete_unscheduled(self) -> None:
        """Removes the steps after the newest one that is due."""
        self.wait()
        due = [step for step in self.steps if step % self._every == 0]
        for step in self.steps:
            if step > max(due, default=0):
                self._manager.delete(step)
        self.wait()

    def _remove_deleted(self) -> None:
        if distributed.is_primary():
            shutil.rmtree(self._folder / DELETED, ignore_errors=True)

    def _open(self) -> ocp.CheckpointManager:
        self._remove_deleted()
        options = ocp.CheckpointManagerOptions(
            preservation_policy=_NewestAndBest(self._workdir, self._every, self._keep),
            cleanup_tmp_directories=True,
            todelete_subdir=DELETED,  # a rename: a kill leaves no step of which half is gone
            enable_async_checkpointing=True,
        )
        return ocp.CheckpointManager(self._folder, options=options)

    def _set_aside(self, step: int) -> None:
        if not distributed.is_primary():
            return
        aside = self._folder / DAMAGED
        aside.mkdir(exist_ok=True)
        shutil.rmtree(aside / str(step), ignore_errors=True)
        (self._folder / str(step)).rename(aside / str(step))

    def _check_room(self, items: Arrays) -> None:
        """Before a byte is written: half a checkpoint would take the room that is left."""
        size = sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(items))
        free = shutil.disk_usage(self._folder).free
        if free < size:
            self._failed(f"{size:,} bytes, and the disk has {free:,} left")

    def _failed(self, reason: Exception | str) -> None:
        for unfinished in (
            self._folder.glob("*.orbax-checkpoint-tmp") if distributed.is_primary() else ()
        ):
            shutil.rmtree(unfinished, ignore_errors=True)
        good = steps_of(self._workdir)
        last = f"checkpoint {good[-1]} stays" if good else "there is none before it"
        # TensorStore gives the whole way to the error, its cause last
        cause = getattr(reason, "strerror", None) or str(reason).split(": ")[-1].split(" [")[0]
        raise Failure(
            f"{self._folder}: a checkpoint cannot be written ({cause}); {last}. Make room, then "
            "the same line goes on"
        ) from (reason if isinstance(reason, Exception) else None)


class _NewestAndBest(preservation_policy.PreservationPolicy):
    """Keeps the newest few steps that are due, the best one and the last one."""

    def __init__(self, workdir: Path, every: int, keep: int):
        self._workdir, self._every, self._keep = workdir, every, keep

    def should_preserve(self, checkpoints: Sequence[Any], *, context: Any) -> Sequence[bool]:
        steps = [checkpoint.step for checkpoint in checkpoints]
        due = sorted(step for step in steps if step % self._every == 0)
        kept = {*due[-self._keep :], max(steps), best_of(self._workdir, steps)}
        return [step in kept for step in steps]


def best_of(workdir: Path, steps: Iterable[int]) -> int | None:
    """The step of the highest accuracy in ``evaluations.csv``, on the first set; the last of them.

    Of use_ema parameters, where the run keeps them. None where no step was evaluated.
    """
    path = workdir / "evaluations.csv"
    try:
        with path.open(newline="") as file:
            rows = [row for row in csv.DictReader(file) if None not in row.values()]
        first = [row for row in rows if row["set"] == rows[0]["set"]]
        use_ema = [row for row in first if row["weights"] == "ema"]
        found = {int(row["step"]): float(row["accuracy"]) for row in use_ema or first}
    except FileNotFoundError:
        found = {}
    except (ValueError, KeyError, csv.Error) as error:
        raise Failure(f"{path} is damaged ({error}): repair it, or move it away") from None
    evaluated = [step for step in steps if step in found]
    return max(evaluated, key=lambda step: (found[step], step), default=None)


def restore(folder: Path, **like: Arrays) -> dict[str, Arrays]:
    """Items of a step by name, on the devices and in the shapes of their likes, verified.

    Raises:
        CorruptCheckpoint: a file is missing or cut off, or an array is not the one that was written.
        Failure: its checksums are of another kind than those of this version.
    """
    found, stored, told = {}, {}, ""
    try:
        stored = ocp.JsonCheckpointHandler().restore(folder / "checksums")
        found = {name: _read_item(folder / name, item) for name, item in like.items()}
    except (MemoryError, PermissionError):
        raise  # nothing is said of the checkpoint by these
    except Exception as error:  # Orbax and TensorStore answer damage with errors of many kinds
        reason = " ".join(str(error).split())
        if any(word in reason for word in ("RESOURCE_EXHAUSTED", "PERMISSION_DENIED")):
            raise
        told = reason[:200] or type(error).__name__
    if told := distributed.first_message(told):
        raise CorruptCheckpoint(told)
    if not isinstance(stored, dict):
        raise CorruptCheckpoint("its checksums are none")
    if all(re.fullmatch("[0-9a-f]{64}", str(checksum)) for checksum in stored.values()):
        told = (
            f"{folder}: written by an earlier version of vmoe, with other checksums; use that "
            "version, or another --workdir"
        )
        raise distributed.synchronized(Failure(told))
    for name, checksum in checksums(found).items():
        if stored.get(name) != checksum:
            raise CorruptCheckpoint(f"{name} has another checksum than it was written with")
    return found


def _read_item(folder: Path, like: Arrays) -> Arrays:
    """One item; the handler itself, since a Checkpointer waits for all processes when one fails."""
    handler = ocp.StandardCheckpointHandler()
    return handler.restore(folder, args=ocp.args.StandardRestore(jax.tree.map(_abstract, like)))


def _abstract(leaf: jax.Array | jax.ShapeDtypeStruct) -> jax.ShapeDtypeStruct:
    sharding = leaf.sharding or jax.sharding.SingleDeviceSharding(jax.local_devices()[0])
    return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding)


def find(path: str | Path) -> tuple[Path, list[int]]:
    """The run folder that a path names, and the steps it may mean, oldest first.

    Raises:
        UsageError: there is no run or no checkpoint.
    """
    path = workdir = Path(path)
    word = path.name if path.parent.name == "checkpoints" else ""
    if word:
        workdir = path.parent.parent
    if not (workdir / "config.json").is_file():
        what = "no such folder" if not workdir.exists() else "not a run folder, no config.json"
        raise UsageError(f"{workdir}: {what}; --checkpoint takes a run or its checkpoints/STEP")
    steps = steps_of(workdir)
    if not steps:
        raise UsageError(f"{workdir}: no checkpoint yet; `vmoe train` writes one")
    named = {"": steps, "last": steps[-1:], "best": [best_of(workdir, steps)]}
    if word.isdigit() and int(word) in steps:
        return workdir, [int(word)]
    if named.get(word, [None]) == [None]:
        words = ["last", *(["best"] if named["best"] != [None] else [])]
        known = ", ".join([*map(str, steps), *words])
        raise UsageError(f"{path}: no such checkpoint; there are {known}")
    return workdir, named[word]
