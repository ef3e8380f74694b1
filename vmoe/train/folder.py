"""The folder of a run: it explains itself, and belongs to one config and one process.

config.json        the run, enough to run it again    model.txt     the model on one page
environment.json   versions, devices, commit          classes.txt   names, in their order
metrics.csv        a row for each report              checkpoints/  STEP/ ...
evaluations.csv    a row for each evaluation          experts.csv   a row for each expert
tensorboard/       all of these, to look at
"""

import contextlib
import dataclasses
import fcntl
import importlib.metadata
import json
import os
import platform
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax

import vmoe
from vmoe import config as configs
from vmoe.analysis.summary import summarize
from vmoe.checkpoints.load import run_config
from vmoe.config import Train
from vmoe.errors import UsageError


@contextlib.contextmanager
def claim(workdir: Path, config: Train, class_names: tuple[str, ...]) -> Iterator[None]:
    """Makes a new run folder that explains itself, or checks that one is this run's.

    Inside the context no other process may claim it; the system lets go when this one ends,
    however it ends.

    Raises:
        UsageError: the folder is another run's, in use, or cannot be written.
    """
    if (workdir / "config.json").exists():
        _check_same(workdir, config)
    try:
        workdir.mkdir(parents=True, exist_ok=True)
        lock = (workdir / ".lock").open("a+")
    except OSError as error:
        raise UsageError(f"--workdir {workdir}: {error.strerror}") from None
    with lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            lock.seek(0)
            raise UsageError(
                f"{workdir}: process {lock.read().strip()} trains in it; wait for its end or use "
                "another --workdir"
            ) from None
        lock.truncate(0)
        lock.write(str(os.getpid()))
        lock.flush()
        if not (workdir / "config.json").exists():
            try:
                _explain(workdir, config, class_names)
            except OSError as error:
                raise UsageError(f"--workdir {workdir}: {error.strerror}") from None
        yield


def _check_same(workdir: Path, config: Train) -> None:
    differences = list(_differences(run_config(workdir), config))
    if differences:
        shown = "; ".join(differences[:8]) + ("; ..." if len(differences) > 8 else "")
        raise UsageError(
            f"{workdir} holds a run of another config ({shown}): use another --workdir, or the "
            "config it was made with"
        )


def _differences(there: Any, here: Any, place: str = "") -> Iterator[str]:
    """A phrase for each field that differs between two configs."""
    if dataclasses.is_dataclass(there) and type(there) is type(here):
        for field in dataclasses.fields(there):
            pair = getattr(there, field.name), getattr(here, field.name)
            yield from _differences(*pair, f"{place}.{field.name}".lstrip("."))
    elif there != here:
        yield f"{place} is {there} there and {here} here"


def _explain(workdir: Path, config: Train, class_names: tuple[str, ...]) -> None:
    texts = {
        "environment.json": json.dumps(environment(), indent=2),
        "model.txt": summarize(config.model, title="model"),
        "classes.txt": "\n".join(class_names),
        "config.json": configs.to_json(config),  # last: a folder that has it has all
    }
    for name, text in texts.items():
        beside = workdir / f"{name}.tmp"
        beside.write_text(text + "\n")
        os.replace(beside, workdir / name)


def environment() -> dict[str, Any]:
    """Versions, devices and the code's commit, as far as a result may depend on them."""
    packages = ("vmoe", "jax", "jaxlib", "flax", "optax", "grain", "numpy", "pillow")
    return {
        "commit": _commit(),
        "python": platform.python_version(),
        "machine": platform.machine(),
        "cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else None,
        "devices": [device.device_kind for device in jax.devices()],
        **{name: importlib.metadata.version(name) for name in packages},
    }


def _commit() -> str | None:
    """The git commit of this code, "+ changes" if it has any; None outside a checkout."""
    root = Path(vmoe.__file__).parents[1]
    if not (root / ".git").exists():
        return None

    def git(*words: str) -> str:
        done = subprocess.run(["git", *words], cwd=root, capture_output=True, text=True)
        return done.stdout.strip()

    try:
        changes = git("status", "--porcelain", "--untracked-files=no")
        return git("rev-parse", "HEAD") + (" + changes" if changes else "") or None
    except OSError:  # no git on this machine
        return None
