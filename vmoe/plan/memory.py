"""Memory of one device during training: exact for the state, from residuals for activations."""

import dataclasses
from typing import Any

import jax

from vmoe.config import TrainConfig, replace
from vmoe.plan.segment import shard_elements, with_shardings
from vmoe.plan.segments import segments
from vmoe.sharding import Placement
from vmoe.train.lr_factors import trained_params
from vmoe.train.state import State


@dataclasses.dataclass(frozen=True)
class Memory:
    """Bytes of one device. Temporary buffers of kernels and collectives are not included.

    With ``accumulate``, activations are counted for one part of the batch.
    """

    parameters: int
    gradients: int
    """As large as the trained parameters; with ``accumulate`` twice, for a part and the sum."""
    opt_state: int
    ema: int
    """The moving average of the parameters; 0 if the config has none."""
    batch: int
    """This device's share of the pixels of a batch, as uint8."""
    saved_activations: float
    """Saved for the backward pass without rematerialization."""
    saved_activations_with_remat: float
    """With ``ViTConfig.remat``: the inputs of all blocks, and all activations of one block."""
    remat: bool
    """Whether the config selects rematerialization."""

    @property
    def activations(self) -> float:
        """Saved activations under the config."""
        return self.saved_activations_with_remat if self.remat else self.saved_activations

    @property
    def state(self) -> int:
        """Memory that a device uses between steps."""
        return self.parameters + self.opt_state + self.ema

    @property
    def arguments(self) -> int:
        """What a training step is given: the state and a batch."""
        return self.state + self.batch

    @property
    def temporaries(self) -> float:
        """An upper bound, because activations are freed while gradients are allocated."""
        return self.gradients + self.activations

    @property
    def total(self) -> float:
        """What a training step needs."""
        return self.arguments + self.temporaries


def memory(config: TrainConfig, placement: Placement, state: State) -> Memory:
    """The memory that a run needs on each device of a placement.

    Args:
        state: shapes of the training state of this config; their shardings are ignored.
    """
    params = with_shardings(state.params, placement.params(state.params))
    opt_state = with_shardings(state.opt_state, placement.opt_state(state.opt_state))
    saved, saved_with_remat = _saved_activations(config, placement)
    return Memory(
        parameters=_bytes(params),
        gradients=_bytes(trained_params(config.optim, params))
        * (2 if config.accumulate > 1 else 1),
        opt_state=_bytes(opt_state),
        ema=0 if state.ema is None else _bytes(params),
        batch=config.batch_size * config.model.image_size**2 * 3 // placement.devices,
        saved_activations=saved,
        saved_activations_with_remat=saved_with_remat,
        remat=config.model.remat,
    )


def _saved_activations(config: TrainConfig, placement: Placement) -> tuple[float, float]:
    """Bytes per device, without and with rematerialization."""
    *blocks, ends = segments(replace(config, model=dict(remat=False)), placement)
    saved = [block.saved_activations() for block in blocks]
    saved_ends = ends.saved_activations()
    tokens = [block.inputs["tokens"] for block in blocks]
    inputs = sum(
        block.times * x.size * x.dtype.itemsize for block, x in zip(blocks, tokens, strict=True)
    )
    total = sum(block.times * size for block, size in zip(blocks, saved, strict=True))
    return total + saved_ends, inputs / placement.devices + max(saved) + saved_ends


def _bytes(tree: Any) -> int:
    """Bytes of one device's shards of a tree of shapes with shardings."""
    return sum(shard_elements(x) * x.dtype.itemsize for x in jax.tree.leaves(tree))
