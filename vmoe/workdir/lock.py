"""The folder of a run: it explains itself, and belongs to one config and one run at a time.

config.json        the run, enough to run it again    model.txt     the model on one page
environment.json   versions, devices, commit, data    classes.txt   names, in their order
metrics.csv        a row for each report              checkpoints/  STEP/ ...
evaluations.csv    a row for each evaluation          experts.csv   a row for each expert
tensorboard/       all of these, to look at
"""

import contextlib
import dataclasses
import fcntl
import functools
import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax

from vmoe import config as configs
from vmoe import distributed
from vmoe.config import TrainConfig
from vmoe.costs.summary import summarize
from vmoe.data.sources import Source
from vmoe.errors import UsageError
from vmoe.sharding import ONE_DEVICE, Placement
from vmoe.train.environment import environment
from vmoe.workdir.layout import read_class_names, read_config, steps_of


@contextlib.contextmanager
def lock_workdir(
    workdir: Path, config: TrainConfig, source: Source, placement: Placement = ONE_DEVICE
) -> Iterator[list[str]]:
    """Makes a new run folder that explains itself, or checks that one is this run's.

    Inside the context no other run may lock_workdir it; the system lets go when this process ends,
    however it ends. Of several processes of one run the first does all this.

    Yields:
        a line about each thing that is not as it was when the run began, and may change it.

    Raises:
        UsageError: the folder is another run's, in use, or cannot be written.
    """
    now = environment() | {
        **{"mesh": str(placement), "processes": jax.process_count()},
        **{"images": len(source), "data": source.fingerprint()},
    }
    with contextlib.ExitStack() as held:

        def hold() -> list[str]:
            if not distributed.is_primary():
                return []
            return held.enter_context(_claim(workdir, config, source, now))

        told = distributed.raise_together(hold)
        distributed.raise_together(functools.partial(_check_shared, workdir))
        yield told


def _check_shared(workdir: Path) -> None:
    """Refuses a folder that not all processes see: each would go on from what it has itself."""
    path = workdir / ".lock"
    held = path.read_text() if path.exists() else "nothing"
    if distributed.first_message(held) != held:
        raise UsageError(
            f"--workdir {workdir}: process {jax.process_index()} does not see what the first one "
            "wrote there; the folder has to lie where all do"
        )


@contextlib.contextmanager
def _claim(
    workdir: Path, config: TrainConfig, source: Source, now: dict[str, Any]
) -> Iterator[list[str]]:
    try:
        if not (workdir / "config.json").exists():
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
        try:
            lock.truncate(0)
            lock.write(f"{os.getpid()}")
            lock.flush()
            if (workdir / "config.json").exists():
                _check_same(workdir, config, source)
                told = _changes(workdir, now)
            elif steps_of(workdir):
                raise UsageError(
                    f"{workdir}: checkpoints but no config.json, which says whose they are: put it "
                    "back, or use another --workdir"
                )
            else:
                _explain(workdir, config, source, now)
                told = []
        except OSError as error:
            raise UsageError(f"--workdir {workdir}: {error.strerror}") from None
        yield told


def _check_same(workdir: Path, config: TrainConfig, source: Source) -> None:
    differences = list(_differences(read_config(workdir), config))
    if differences:
        raise UsageError(
            f"{workdir} holds a run of another config ({'; '.join(differences)}): use another "
            "--workdir, or the config it was made with"
        )
    if tuple(read_class_names(workdir)) != source.class_names:
        raise UsageError(
            f"{workdir}: {source.name} no longer has the classes that this run began with "
            f"({workdir / 'classes.txt'}): use another --workdir"
        )


def _differences(there: Any, here: Any, place: str = "") -> Iterator[str]:
    """A phrase for each field that differs between two configs."""
    if dataclasses.is_dataclass(there) and type(there) is type(here):
        parts = [field.name for field in dataclasses.fields(there)]
        pairs = {name: (getattr(there, name), getattr(here, name)) for name in parts}
    elif isinstance(there, tuple) and isinstance(here, tuple) and len(there) == len(here):
        pairs = {str(i): pair for i, pair in enumerate(zip(there, here, strict=True))}
    else:
        if there != here:
            yield f"{place} is {there} there and {here} here"
        return
    for name, pair in pairs.items():
        yield from _differences(*pair, f"{place}.{name}".lstrip("."))


def _changes(workdir: Path, now: dict[str, Any]) -> list[str]:
    """What of the environment and the data is not as it was when the run began."""
    path = workdir / "environment.json"
    try:
        then = json.loads(path.read_text())
    except (OSError, ValueError) as error:
        raise UsageError(f"{path}: cannot be read ({error}); a run folder holds it") from None
    told = []
    if then.get("data") != now["data"]:
        told.append(
            f"{workdir}: the training data is no longer that of its start ({then.get('images')} "
            f"images then, {now['images']} now): it goes on, and not as it would have"
        )
    names = ("jax", "jaxlib", "devices", "mesh", "processes", "cores", "grain", "numpy", "pillow")
    for name in names:
        if then.get(name) != now[name]:
            told.append(
                f"{workdir}: it began with {name} {then.get(name)}, now {now[name]}: the same "
                "steps may round otherwise"
            )
    return told


def _explain(workdir: Path, config: TrainConfig, source: Source, now: dict[str, Any]) -> None:
    texts = {
        "environment.json": json.dumps(now, indent=2),
        "model.txt": summarize(config.model, title="model"),
        "classes.txt": "\n".join(source.class_names),
        "config.json": configs.to_json(config),  # last: a folder that has it has all
    }
    for name, text in texts.items():
        beside = workdir / f"{name}.tmp"
        beside.write_text(text + "\n")
        os.replace(beside, workdir / name)
