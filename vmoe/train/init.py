"""The initial parameters of a run, if they come from a trained model instead of the seed."""

import hashlib
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from vmoe import zoo
from vmoe.checkpoints import read
from vmoe.checkpoints.checksums import checksums
from vmoe.checkpoints.remote import url_of
from vmoe.checkpoints.restore import find, has_checkpoint, is_run
from vmoe.config import ViTConfig
from vmoe.errors import UsageError, listed, naming
from vmoe.surgery import Changes, fit
from vmoe.train.lr_factors import Params
from vmoe.train.state import State
from vmoe.workdir.layout import CHECKPOINTS, has_config, read_init

NAMED = 5  # parameters listed in a message


class InitFrom(NamedTuple):
    """A trained model that a run starts from.

    Attributes:
        path: a path, name or URL for ``vmoe.load``.
        new_head: start with a new head, as for another number of classes.
        partial: accept that other parameters are new or dropped.
    """

    path: str
    new_head: bool = False
    partial: bool = False


class Init(NamedTuple):
    """Parameters to start from.

    Attributes:
        params: the parameters as nested dicts, on the host.
        record: their source and a checksum; kept in the run folder.
        changes: the parameters that are loaded, new, dropped and resized.
        class_names: class names of the source.
    """

    params: Params
    record: dict[str, Any]
    changes: Changes
    class_names: tuple[str, ...]

    def apply(self, state: State) -> State:
        """The initial state with these parameters; the moving average starts from them, too."""
        shardings = jax.tree.map(lambda x: x.sharding, state.params)
        params = jax.device_put(self.params, shardings)
        ema = None if state.ema is None else jax.tree.map(jnp.copy, params)
        return state._replace(params=params, ema=ema)


def read_source(source: InitFrom | None, workdir: Path, config: ViTConfig) -> Init | None:
    """The parameters that a run starts from; None if it starts from random ones or a checkpoint.

    A run that was killed before its first checkpoint starts from the recorded source again, unless
    another one is given.

    Args:
        workdir: the run folder.
        config: config of the model of the new run.

    Raises:
        UsageError: there is no trained model, its parameters do not fit the model or have changed
            since the run began; or a run with a checkpoint began from another source.
    """
    if source is not None:
        source = source._replace(path=_absolute(source.path))
    known = has_config(workdir)
    recorded = read_init(workdir) if known else None
    began = None
    if recorded is not None:
        began = InitFrom(*(recorded[name] for name in InitFrom._fields))
    if known and has_checkpoint(workdir):
        if source not in (None, began):
            raise UsageError(
                f"workdir {workdir}: its run began from {_text(began)}, not from {_text(source)}: "
                "use another workdir"
            ).remedied_by(workdir=None)
        return None
    if source is None or source == began:
        source = began
    else:
        recorded = None
    if source is None:
        return None
    stored = read(source.path if recorded is None else _step_of(source.path, recorded["step"]))
    names = json.dumps(checksums(stored.params, local=True), sort_keys=True)
    checksum = hashlib.sha256(names.encode()).hexdigest()
    if recorded is not None and recorded["checksum"] != checksum:
        raise UsageError(
            f"{source.path}: its parameters have changed since the run in {workdir} began; restore "
            "them, or use another workdir"
        ).remedied_by(workdir=None)
    try:
        with naming(init=source.path):
            params, changes = fit(
                stored.config,
                stored.params,
                config,
                new_head=source.new_head,
                partial=source.partial,
            )
    except UsageError as error:  # its remedies are fields of the config, or of InitFrom
        if "partial" in error.remedies:
            error.remedied_by(init_partial=True)
        raise
    record = source._asdict() | {"step": stored.step, "checksum": checksum}
    record |= {"weights": stored.origin.weights}
    return Init(jax.device_get(params), record, changes, stored.class_names)


def _step_of(path: str, step: int | None) -> Path | str:
    """The path of a step, if the source is a run, since the run may have been trained further."""
    if is_run(Path(path)):
        folder = find(Path(path))[0] / CHECKPOINTS / str(step)
        return folder if folder.is_dir() else path
    return path


def _absolute(path: str) -> str:
    """The absolute path; names of the zoo and URLs are returned unchanged."""
    if url := url_of(path):
        return url
    return path if zoo.resolve(path) != path else str(Path(path).expanduser().absolute())


def _shown(path: str) -> str:
    """A path relative to the working directory, if it is below it; others are unchanged."""
    below = Path(path).is_relative_to(Path.cwd())
    return str(Path(path).relative_to(Path.cwd())) if below else path


def _text(source: InitFrom | None) -> str:
    if source is None:
        return "random parameters"
    options = [name for name in ("new_head", "partial") if getattr(source, name)]
    return f"{source.path} ({', '.join(options)})" if options else source.path


def messages(init: Init, class_names: tuple[str, ...]) -> Iterator[str]:
    """Lines about the source, and about parameters that are new, dropped or resized.

    Args:
        class_names: class names of the training data.
    """
    record, changes = init.record, init.changes
    average = " (moving average)" if record["weights"] == "ema" else ""
    step = "" if record["step"] is None else f", step {record['step']}"
    path = _shown(record["path"])
    yield f"starting from {path}{step}{average}: {len(changes.loaded)} parameters loaded"
    for name in ("new", "dropped", "resized"):
        if paths := getattr(changes, name):
            yield f"{len(paths)} {name}: {listed(paths, NAMED)}"
    if "head/classes/kernel" in changes.loaded and init.class_names != class_names:
        yield (
            f"the head is kept, with classes {listed(init.class_names, NAMED)}; the classes of the "
            f"data are {listed(class_names, NAMED)}; for a new head, set init_new_head=True"
        )
