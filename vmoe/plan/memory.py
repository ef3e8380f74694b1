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
    """Bytes of one device. Buffers of collectives are not included.

    With ``accumulate``, activations and gradients are those of one part of the batch.
    """

    parameters: int
    gradients: int
    """As large as the trained parameters."""
    gradient_sum: int
    """With ``accumulate``, the sum over the parts so far; else 0."""
    gathered: int
    """With fsdp, the new values of the experts, of which each device updates a part: they are held
    beside the old ones, since only the optimizer state of experts is split over "data"."""
    opt_state: int
    ema: int
    """The moving average of the parameters; 0 if the config has none."""
    batch: int
    """This device's share of the pixels of a batch, as uint8."""
    pixels: int
    """With ``accumulate``, the same in float32, which are held until the last part; else 0."""
    saved_activations: float
    """Saved for the backward pass without rematerialization."""
    saved_activations_with_remat: float
    """With ``ViTConfig.remat``: the inputs of all blocks, and what embedding and head need."""
    working: float
    """For the backward pass of a block: the gradient of its largest array. Except on TPUs, products
    are kernels of libraries, which write it in float32, and rounding makes another array."""
    working_with_remat: float
    """With ``ViTConfig.remat``, the same and all activations of a block."""
    remat: bool
    """Whether the config selects rematerialization."""

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
        """What a training step needs besides, under the config."""
        return self.temporaries_with(remat=self.remat)

    def temporaries_with(self, *, remat: bool) -> float:
        """What a step needs besides its arguments, with or without rematerialization.

        Activations are freed while gradients are made, so that only the larger of the two counts.
        """
        saved = self.saved_activations_with_remat if remat else self.saved_activations
        working = self.working_with_remat if remat else self.working
        held = self.gradient_sum + self.gathered + self.pixels
        return held + max(self.gradients, saved) + working

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
    trained = trained_params(config.optim, params)
    updated = with_shardings(trained, placement.opt_state(trained))
    gradients = _bytes(trained)
    *blocks, ends = segments(replace(config, model=dict(remat=False)), placement)
    saved = [block.saved_activations() for block in blocks]
    tokens = [block.inputs["tokens"] for block in blocks]
    inputs = sum(
        block.times * x.size * x.dtype.itemsize for block, x in zip(blocks, tokens, strict=True)
    )
    saved_ends = sum(ends.saved_activations())
    batch = config.batch_size * config.model.image_size**2 * 3 // placement.devices
    rounded = config.model.dtype == "bfloat16" and placement.platform != "tpu"
    copies = 3 if rounded else 1  # float32 takes as much as two in bfloat16
    working = copies * max(map(max, saved))
    return Memory(
        parameters=_bytes(params),
        gradients=gradients,
        gradient_sum=gradients if config.accumulate > 1 else 0,
        gathered=_bytes(
            [
                old
                for old, new in zip(*map(jax.tree.leaves, (trained, updated)), strict=True)
                if old.sharding != new.sharding
            ]
        ),
        opt_state=_bytes(opt_state),
        ema=0 if state.ema is None else _bytes(params),
        batch=batch,
        pixels=4 * batch if config.accumulate > 1 else 0,
        saved_activations=saved_ends
        + sum(block.times * sum(each) for block, each in zip(blocks, saved, strict=True)),
        saved_activations_with_remat=saved_ends + inputs / placement.devices,
        working=working,
        working_with_remat=working + max(map(sum, saved)),
        remat=config.model.remat,
    )


def _bytes(tree: Any) -> int:
    """Bytes of one device's shards of a tree of shapes with shardings."""
    return sum(shard_elements(x) * x.dtype.itemsize for x in jax.tree.leaves(tree))
