"""The checkpoints of a run: ``checkpoints/STEP/`` with the parameters and what training adds.

The parameters are an item of their own, so that a model loads without the optimiser's moments.
Orbax writes beside and renames: a step that exists is whole.
"""

from pathlib import Path
from typing import Any

import jax
import orbax.checkpoint as ocp

from vmoe.config import UsageError

Arrays = dict[str, Any]


class Checkpoints:
    """The checkpoints below a run folder; a context manager that ends with all writes done."""

    def __init__(self, workdir: Path):
        self.folder = (workdir / "checkpoints").absolute()
        options = ocp.CheckpointManagerOptions(
            max_to_keep=2, cleanup_tmp_directories=True, enable_async_checkpointing=True
        )
        self._manager = ocp.CheckpointManager(self.folder, options=options)

    def __enter__(self) -> "Checkpoints":
        return self

    def __exit__(self, *exception: object) -> None:
        self._manager.wait_until_finished()
        self._manager.close()

    @property
    def latest(self) -> int | None:
        """The newest step; None before the first."""
        return self._manager.latest_step()

    def save(self, step: int, params: Arrays, training: Any) -> None:
        """Starts to write a step; a copy is taken at once, so that the arrays may be donated."""
        items = {"params": params, "training": training}
        save = {name: ocp.args.StandardSave(item) for name, item in items.items()}
        self._manager.save(step, args=ocp.args.Composite(**save))

    def restore(self, step: int, **like: Any) -> dict[str, Any]:
        """The items of a step by name, on the devices and in the shapes of their likes."""
        restore = {
            name: ocp.args.StandardRestore(jax.tree.map(_abstract, item))
            for name, item in like.items()
        }
        found = self._manager.restore(step, args=ocp.args.Composite(**restore))
        return {name: found[name] for name in like}


def latest_step(workdir: Path) -> int:
    """The newest step of a run folder, which is only read: a run may be writing to it.

    Raises:
        UsageError: it has none.
    """
    steps = [int(path.name) for path in (workdir / "checkpoints").glob("*") if path.name.isdigit()]
    if not steps:
        raise UsageError(f"{workdir}: no checkpoint yet; `vmoe train` writes one")
    return max(steps)


def read_params(workdir: Path, step: int, like: Arrays) -> Arrays:
    """The parameters of a step, which is only read, in the shapes of their likes."""
    folder = (workdir / "checkpoints" / str(step) / "params").absolute()
    with ocp.StandardCheckpointer() as checkpointer:
        return checkpointer.restore(folder, jax.tree.map(_abstract, like))


def _abstract(leaf: jax.Array | jax.ShapeDtypeStruct) -> jax.ShapeDtypeStruct:
    sharding = leaf.sharding or jax.sharding.SingleDeviceSharding(jax.devices()[0])
    return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding)
