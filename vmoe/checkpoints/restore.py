"""Finds and restores the steps of a run; ``run.py`` describes and writes them."""

import contextlib
import errno
import hashlib
import json
import os
import re
import shlex
import time
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import orbax.checkpoint as ocp

from vmoe import distributed
from vmoe.checkpoints.checksums import checksums
from vmoe.checkpoints.older import CURRENT, OLDER, current_name, renamed
from vmoe.checkpoints.orbax_logging import hide_late_reports
from vmoe.errors import Failure, UsageError, VmoeError, is_out_of_memory, parse_json
from vmoe.host.retry import LASTING, failure, retried
from vmoe.workdir.layout import CHECKPOINTS, has_config, steps_of

Arrays = Any  # a tree of arrays
Metrics = dict[str, float]

FORMAT = 2
CORRUPT = "corrupt"  # a sub-folder of checkpoints/
READ = 1 << 20  # bytes read at a time
PAUSE = 1.0  # seconds before a step that could not be read is read again
FINAL = LASTING - {errno.ENOENT} | {0}  # errors (0 for none) after which it is not read again
# Errors that a missing file, or a wrong name or position in another file, can raise.
BY_CORRUPTION = (0, errno.ENOENT, errno.ENOTDIR, errno.EISDIR, errno.EINVAL, errno.ENAMETOOLONG)
# Messages of Orbax and TensorStore about a missing file: the database, an array in it, the tree.
MISSING = re.compile(r"NOT_FOUND|at byte 0;|pytree structure error|Dict key mismatch")
# Orbax's message about an array that is only in the checkpoint, or only in the target.
OTHER_ARRAYS = re.compile(r"^(\S+):\n *- Source: ", re.MULTILINE)


class CorruptCheckpoint(Exception):
    """A checkpoint that cannot be trusted; the message contains the array or the file."""


def has_checkpoint(workdir: Path) -> bool:
    """Whether a run folder has a checkpoint, valid or corrupt."""
    return bool(steps_of(workdir)) or (workdir / CHECKPOINTS / CORRUPT).exists()


def is_run(path: Path) -> bool:
    """Whether a path is a run folder, or a step in one; see ``find``."""
    return has_config(split_path(path)[0])


def find(path: Path) -> tuple[Path, list[int]]:
    """The run folder of a path, and the steps that the path may refer to, ascending.

    Args:
        path: a run folder, or its ``checkpoints/STEP``, ``checkpoints/best``, ``checkpoints/last``.
    """
    workdir, name = split_path(path)
    steps = steps_of(workdir)
    if not steps and has_checkpoint(workdir):
        raise all_corrupt(workdir)
    if not steps:
        raise UsageError(f"{workdir}: no checkpoint yet; training writes one")
    best = best_step(read_metrics(workdir), steps)
    named = {"": steps, "last": steps[-1:]} | ({} if best is None else {"best": [best]})
    if name.isdigit() and int(name) in steps:
        return workdir, [int(name)]
    if name not in named:
        known = ", ".join([*map(str, steps), *filter(None, named)])
        raise UsageError(f"{path}: no such checkpoint; choose from {known}")
    return workdir, named[name]


def split_path(path: Path) -> tuple[Path, str]:
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
        Failure: a file cannot be read, or the checkpoint has another format version.
        UsageError: the devices that ``JAX_PLATFORMS`` names are not there.
    """
    return restore_with_files(folder, target)[0]


def restore_with_files(
    folder: Path, target: dict[str, Arrays]
) -> tuple[dict[str, Arrays], dict[str, Sequence[Any]]]:
    """The items of a step, and the values saved with it about other files; see ``restore``.

    A step that cannot be read is read again after a pause: a file system that is away for a moment
    raises errors, or its files seem to be missing.
    """
    distributed.check_devices()  # without them nothing can be restored, whatever is in the files
    with contextlib.suppress(_MayPass):
        return _restore(folder, target, again=False)
    time.sleep(PAUSE)
    return _restore(folder, target, again=True)


class _MayPass(Exception):
    """A step cannot be read, perhaps only for a moment; every process raises it."""


def _restore(
    folder: Path, target: dict[str, Arrays], *, again: bool
) -> tuple[dict[str, Arrays], dict[str, Sequence[Any]]]:
    """See ``restore_with_files``; raises _MayPass unless it is called again."""
    hide_late_reports()
    items, index, problem, older = {}, {}, _Problem(), False
    path: Any = folder.absolute()  # Orbax annotates its own path type, but takes any
    try:
        index = ocp.JsonCheckpointHandler().restore(path / "checksums")
        _check_index(folder, index)
        older = any(current_name(name) != name for name in index["arrays"])
        written = renamed(target, CURRENT, OLDER) if older else target
        items = {name: _restore_item(path / name, item) for name, item in written.items()}
    except (VmoeError, MemoryError):
        raise  # these do not mean that the checkpoint is corrupt
    except Exception as error:  # Orbax and TensorStore report corruption by errors of many types
        problem = _problem(folder, error, again=again)
    local = not any(leaf.sharding for leaf in jax.tree.leaves(target))
    _raise_together(problem, local=local)
    for name, checksum in checksums(items, local=local).items():
        if index["arrays"].get(name) != checksum:
            raise CorruptCheckpoint(f"the checksum of {name} differs from the one written")
    return renamed(items, OLDER, CURRENT) if older else items, index["files"]


class _Problem(NamedTuple):
    """Why a step cannot be read.

    Attributes:
        may_pass: whether it may be read after a pause.
        unreadable: the message about a file that cannot be read; empty if there is none.
        corrupt: a few words about what is corrupt, unless it is unreadable.
    """

    may_pass: bool = False
    unreadable: str = ""
    corrupt: str = ""


def _problem(folder: Path, error: Exception, *, again: bool) -> _Problem:
    """Classifies an error of Orbax or TensorStore; raises it if it is about memory."""
    number = _file_error(error)
    if not number and is_out_of_memory(error):
        raise error
    if not number or again:
        number = _unreadable_file(folder) or number
    unreadable = ""
    if number not in BY_CORRUPTION:
        unreadable = str(failure(folder, OSError(number, os.strerror(number))))
    return _Problem(not again and number not in FINAL, unreadable, _reason(error))


def _raise_together(problem: _Problem, *, local: bool) -> None:
    """Raises an error for a problem of any process, or, if ``local``, of this process."""
    may_pass, unreadable, corrupt = problem
    if not local:  # every process restores its shards
        may_pass = distributed.any_process(may_pass)
        unreadable, corrupt = map(distributed.first_message, (unreadable, corrupt))
    if may_pass:
        raise _MayPass
    if unreadable:
        raise Failure(unreadable) if local else distributed.synchronized(Failure(unreadable))
    if corrupt:
        raise CorruptCheckpoint(corrupt)


def _file_error(error: BaseException | None) -> int:
    """The errno behind an error of a reader; ENOENT if a file is missing, 0 if there is neither.

    Orbax chains its error to the error of the system. TensorStore quotes the system's error:
    [OS error 116: ESTALE Stale ...].
    """
    missing = 0
    while error:
        quoted = re.search(r"OS error (\d+)", str(error))
        number = int(quoted[1]) if quoted else getattr(error, "errno", None)
        if number and number not in BY_CORRUPTION:
            return number
        if isinstance(error, FileNotFoundError) or MISSING.search(str(error)):
            missing = errno.ENOENT
        error = error.__cause__ or error.__context__
    return missing


def _unreadable_file(folder: Path) -> int:
    """The errno of a file below a folder that cannot be read; 0 if all can be read."""

    def fail(error: OSError) -> None:
        raise error

    try:
        for parent, _, names in os.walk(folder, onerror=fail):
            for name in names:
                with open(os.path.join(parent, name), "rb", buffering=0) as file:
                    while file.read(READ):
                        pass
    except OSError as error:
        return error.errno or 0
    return 0


def _reason(error: Exception) -> str:
    """A few words about an error of Orbax or TensorStore: the array or the file that it names."""
    if other := OTHER_ARRAYS.search(str(error)):
        return f"{other[1].replace('.', '/')} is missing, or unknown to the config"
    text = " ".join(str(error).split())
    paths = re.findall(r"[\w.-]*/[\w./-]+", text)
    if paths:
        return f"{Path(paths[-1]).name} unreadable"
    return text.split(" [")[0].split(": ")[-1][:100] or type(error).__name__


def all_corrupt(workdir: Path, messages: Sequence[str] = ()) -> Failure:
    moved = workdir / CHECKPOINTS / CORRUPT
    step = max(steps_of(workdir, f"{CHECKPOINTS}/{CORRUPT}"), default="STEP")
    put_back = shlex.join(["mv", f"{moved}/{step}", f"{workdir / CHECKPOINTS}/"])
    return Failure(
        f"{workdir}: {'; '.join([*messages, 'every checkpoint is corrupt'])} (moved to {moved}); "
        f"restore the files of one and put it back ({put_back}), or start over in another workdir"
    ).remedied_by(workdir=None)


def _check_index(folder: Path, index: Any) -> None:
    """Checks the item ``checksums``: its own checksum and its format version.

    All processes read the same file, so they raise the same error.
    """
    if not isinstance(index, dict):
        raise ValueError("its checksums have changed")
    sealed = "sha256" in index or index.get("format") == FORMAT  # format 1 had no seal
    if sealed and index.pop("sha256", None) != sha256_of(index):
        raise ValueError("its checksums have changed")
    if (version := index.get("format")) != FORMAT:
        raise distributed.synchronized(
            Failure(
                f"{folder}: checkpoint format {version}, this version of vmoe reads {FORMAT}; use "
                "the version that wrote it, or another workdir"
            ).remedied_by(workdir=None)
        )
    step = index.get("step")  # earlier checkpoints of this format have none
    if step is not None and folder.name.isdigit() and int(folder.name) != step:
        raise ValueError(f"it is a copy of checkpoint {step}")


def sha256_of(index: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(index, sort_keys=True).encode()).hexdigest()


def _restore_item(path: Any, target: Arrays) -> Arrays:
    """Restores an item with its handler; a Checkpointer would wait for a process that failed."""
    handler = ocp.StandardCheckpointHandler()
    return handler.restore(path, args=ocp.args.StandardRestore(jax.tree.map(_abstract, target)))


def _abstract(leaf: jax.Array | jax.ShapeDtypeStruct) -> jax.ShapeDtypeStruct:
    sharding = leaf.sharding or jax.sharding.SingleDeviceSharding(jax.local_devices()[0])
    return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding)


def best_step(metrics: dict[int, Metrics], steps: Iterable[int]) -> int | None:
    """The step of the highest recorded accuracy, the latest one on ties; None if none is known."""
    known = [step for step in steps if "accuracy" in metrics.get(step, {})]
    return max(known, key=lambda step: (metrics[step]["accuracy"], step), default=None)


def metrics_file(workdir: Path) -> Path:
    return workdir / CHECKPOINTS / "metrics.json"


def read_metrics(workdir: Path) -> dict[int, Metrics]:
    """The metrics recorded for each step; none if there is no file."""
    path = metrics_file(workdir)
    try:
        steps = parse_json(retried(path, path.read_bytes))
        if not isinstance(steps, dict) or not all(
            isinstance(each, dict) for each in steps.values()
        ):
            raise ValueError("expected a JSON object of metrics by step")
        return {
            int(step): {name: float(value) for name, value in metrics.items()}
            for step, metrics in steps.items()
        }
    except FileNotFoundError:
        return {}
    except OSError as error:
        raise failure(path, error) from None
    except (ValueError, TypeError) as error:
        raise Failure(
            f"{path} is corrupt ({error}): restore it, or remove it, which loses the choice of the "
            "best checkpoint"
        ) from None
