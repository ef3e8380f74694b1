"""What one device holds of a run: between steps, and at the height of a step."""

import dataclasses
import math
from typing import Any

import jax

from vmoe.config import TrainConfig, replace
from vmoe.plan.segments import lying, pieces, share
from vmoe.sharding import Placement
from vmoe.train.state import State


@dataclasses.dataclass(frozen=True)
class Memory:
    """Bytes of one device. Buffers that come and go, in kernels or for messages, are not in it."""

    parameters: int
    gradients: int
    """As the parameters."""
    optimizer: int
    average: int
    """Of the moving average of the parameters; 0 where the config asks for none."""
    kept: float
    """From the forward to the backward pass, where nothing is computed again."""
    kept_with_remat: float
    """The same with ``ViTConfig.remat``: of each block its input, and all of one block."""
    remat: bool
    """Which of the two the config asks for."""

    @property
    def activations(self) -> float:
        return self.kept_with_remat if self.remat else self.kept

    @property
    def state(self) -> int:
        """What lies there between steps."""
        return self.parameters + self.optimizer + self.average

    @property
    def total(self) -> float:
        """More than is ever held at once, since gradients come as activations go."""
        return self.state + self.gradients + self.activations


def memory(config: TrainConfig, placement: Placement, state: State) -> Memory:
    """The state exactly, from its shapes and where they lie; activations from the residuals.

    Args:
        state: shapes alone; ``Program.like`` of this config.
    """
    params = lying(state.params, placement.params(state.params))
    moments = lying(state.opt_state, placement.opt_state(state.opt_state))
    kept, kept_with_remat = _activations(config, placement)
    return Memory(
        parameters=held(params),
        gradients=held(params),
        optimizer=held(moments),
        average=0 if state.ema is None else held(params),
        kept=kept,
        kept_with_remat=kept_with_remat,
        remat=config.model.remat,
    )


def held(tree: Any) -> int:
    """Bytes that a device holds of arrays, by their shapes and shardings."""
    return sum(math.prod(share(x)) * x.dtype.itemsize for x in jax.tree.leaves(tree))


def _activations(config: TrainConfig, placement: Placement) -> tuple[float, float]:
    """Bytes kept without and with rematerialisation."""
    *blocks, ends = pieces(replace(config, model=dict(remat=False)), placement)
    kept = {block.name: block.kept() for block in blocks}
    inputs = sum(
        block.times * block.inputs["tokens"].size * block.inputs["tokens"].dtype.itemsize
        for block in blocks
    )
    whole = sum(block.times * kept[block.name] for block in blocks)
    again = inputs / placement.devices + max(kept.values())
    return whole + ends.kept(), again + ends.kept()
