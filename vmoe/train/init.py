"""The first parameters of a run, if they come from another run instead of the seed."""

import hashlib
import json
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from vmoe.checkpoints import read
from vmoe.checkpoints.checksums import by_name, checksums
from vmoe.checkpoints.restore import has_checkpoint
from vmoe.errors import UsageError
from vmoe.sharding import Placement
from vmoe.train.optim import Params
from vmoe.train.state import State
from vmoe.workdir.layout import CHECKPOINTS, has_config, read_init


class Init(NamedTuple):
    """Parameters to start from.

    Attributes:
        params: as nested dicts, on the host.
        record: where they come from, with a checksum; kept in the run folder.
    """

    params: Params
    record: dict[str, Any]

    def apply(self, state: State, placement: Placement) -> State:
        """A first state with these parameters, which are also the start of the moving average."""
        where = None if placement.mesh is None else placement.params(self.params)
        params = jax.device_put(self.params, where)
        ema = None if state.ema is None else jax.tree.map(jnp.copy, params)
        return state._replace(params=params, ema=ema)


def read_source(source: Path | None, workdir: Path, shapes: Params) -> Init | None:
    """The parameters that a run starts from; None if it starts from random ones or a checkpoint.

    A run that was killed before its first checkpoint starts from the recorded source again.

    Args:
        source: a trained model, see ``vmoe.checkpoints.read``.
        workdir: the run folder.
        shapes: of the parameters of the new run.

    Raises:
        UsageError: there is no trained model, its parameters have other names or shapes, or they
            have changed since the run began; or the run began from another source.
    """
    recorded = None
    if has_config(workdir):
        recorded = read_init(workdir)
        began = None if recorded is None else Path(recorded["path"])
        if source is not None and source.absolute() != began:
            raise UsageError(
                f"workdir {workdir}: its run began from {began or 'random parameters'}, not from "
                f"{source}: use another workdir"
            )
        source = began
        if has_checkpoint(workdir):
            return None
    if source is None:
        return None
    # The source may have been trained further since.
    step = source / CHECKPOINTS / str(recorded["step"]) if recorded is not None else source
    stored = read(step if step.is_dir() else source)
    _check_shapes(source, stored.params, shapes)
    names = json.dumps(checksums(stored.params, local=True), sort_keys=True)
    checksum = hashlib.sha256(names.encode()).hexdigest()
    if recorded is not None and recorded["checksum"] != checksum:
        raise UsageError(
            f"{source}: its parameters have changed since the run in {workdir} began; restore "
            "them, or use another workdir"
        )
    record = {"path": str(source.absolute()), "step": stored.step, "checksum": checksum}
    return Init(jax.device_get(stored.params), record | {"weights": stored.origin.weights})


def _check_shapes(source: Path, params: Params, shapes: Params) -> None:
    theirs, ours = (
        {name: f"{leaf.dtype}{list(leaf.shape)}" for name, leaf in by_name(tree).items()}
        for tree in (params, shapes)
    )
    for name in ours | theirs:
        if ours.get(name) != theirs.get(name):
            there, here = theirs.get(name, "missing"), ours.get(name, "missing")
            raise UsageError(
                f"init={source}: parameter {name} is {there} there and {here} in the model of this "
                "run; use the same model"
            )
