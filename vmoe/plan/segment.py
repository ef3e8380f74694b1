"""One segment of a training step and its costs: FLOPs, collectives, saved activations.

A segment is traced and compiled separately, from shapes: forward pass, backward pass and the update
of its own parameters.
"""

import dataclasses
import itertools
import math
from collections.abc import Callable
from typing import Any, cast

import jax
import jax.numpy as jnp
import optax

from vmoe.config import TrainConfig
from vmoe.costs.collectives import COMPILER_OPTIONS, Collective, parse_collectives
from vmoe.costs.flops import count_flops
from vmoe.costs.residuals import Residual, residuals
from vmoe.sharding import Placement
from vmoe.train.lr_factors import Params, trained_params
from vmoe.train.optim import optimizer, update_ema
from vmoe.trees import merged

Inputs = dict[str, Any]
SegmentState = tuple[Params, Any, Params | None]
"""Parameters, optimizer state, moving average of the parameters."""


@dataclasses.dataclass(frozen=True)
class Segment:
    """A part of a step, as a function of its parameters and its inputs."""

    name: str
    times: int
    """Number of executions in a step, or with ``accumulate`` in each part of it."""
    config: TrainConfig
    placement: Placement
    params: Params
    """Shapes of its parameters."""
    inputs: Inputs
    """Shapes of its inputs by name. "key" is replicated; the first axis of all others is split over
    the devices. The gradient of "tokens" is passed to the previous segment."""
    forward: Callable[[Params, Inputs], Any]
    """Computes the outputs that the rest of the step uses."""

    @property
    def times_per_step(self) -> int:
        """Number of executions in a step."""
        return self.times * self.config.accumulate

    @property
    def program_key(self) -> tuple[str, str]:
        """Equal for segments with equal collectives.

        If the whole state of a segment is replicated, its program depends on the number of devices,
        but not on the mesh.
        """
        leaves = jax.tree.leaves(self._arguments()[0])
        replicated = all(x.sharding is None or x.sharding.is_fully_replicated for x in leaves)
        return self.name, "" if replicated else str(self.placement)

    def flops(self) -> int:
        """FLOPs of the matmuls, forward and backward, summed over all devices."""
        return count_flops(jax.make_jaxpr(self._step)(*self._arguments()).jaxpr)

    def collectives(self) -> list[Collective]:
        """The collectives of one execution, from the program compiled for the placement."""
        if self.placement.mesh is None:
            return []
        state, inputs = self._arguments()
        shardings = jax.tree.map(lambda x: x.sharding, state)
        step = jax.jit(self._step, out_shardings=(shardings, None))
        compiled = step.lower(state, inputs).compile(compiler_options=COMPILER_OPTIONS)
        text = compiled.as_text()
        assert text is not None, "the CPU compiler always provides the text of a program"
        return parse_collectives(text)

    def saved_activations(self) -> list[float]:
        """Bytes per device of each array that one execution saves for its backward pass.

        Arrays that depend on the inputs are split over all devices. A parameter counts only if the
        saved copy differs from the one in the state: rounded, or gathered over "data". A copy that
        each device makes of its own part, inside a ``jax.shard_map``, is on that device alone.
        """
        gathered = dataclasses.replace(self.placement, fsdp=False)
        stored, in_use = (
            jax.tree.leaves(with_shardings(self.params, placement.params(self.params)))
            for placement in (self.placement, gathered)
        )
        params = list(zip(stored, in_use, strict=True))
        platform = self.placement.platform
        saved = residuals(self.forward, self.params, self.inputs, platform=platform)
        return [self._saved_bytes(residual, params) for residual in saved]

    def _saved_bytes(self, residual: Residual, params: list[tuple[Any, Any]]) -> float:
        """Bytes of a residual; ``params``: parameters with their shardings in state and in use."""
        if not residual.of_params or residual.parts > 1:
            return _elements(residual, self.placement) * residual.itemsize
        for stored, in_use in params:
            if math.prod(stored.shape) == residual.size:
                if residual.is_param and stored.sharding == in_use.sharding:
                    return 0.0
                return float(shard_elements(in_use) * residual.itemsize)
        return float(residual.size * residual.itemsize)

    def _arguments(self) -> tuple[SegmentState, Inputs]:
        """The shapes of the step's arguments, with shardings."""
        placement, optim = self.placement, optimizer(self.config)
        opt_state = jax.eval_shape(optim.init, trained_params(self.config.optim, self.params))
        params = with_shardings(self.params, placement.params(self.params))
        inputs = {
            name: with_shardings(x, placement.replicated() if name == "key" else placement.batch())
            for name, x in self.inputs.items()
        }
        ema = params if self.config.ema_decay else None
        return (params, with_shardings(opt_state, placement.opt_state(opt_state)), ema), inputs

    def _step(self, state: SegmentState, inputs: Inputs) -> tuple[SegmentState, Any]:
        """Forward, backward and update; the outputs stand in for their gradients."""
        params, opt_state, ema = state
        tokens = {name: x for name, x in inputs.items() if name == "tokens"}
        trained = trained_params(self.config.optim, params)
        out, backward = jax.vjp(
            lambda trained, tokens: self.forward(merged(params, trained), inputs | tokens),
            trained,
            tokens,
        )
        gradient, tokens_gradient = backward(out)
        updates, opt_state = optimizer(self.config).update(gradient, opt_state, trained)
        trained = cast(Params, optax.apply_updates(trained, updates))
        if ema is not None:
            ema = update_ema(self.config, ema, trained, jnp.zeros((), jnp.int32))
        return (merged(params, trained), opt_state, ema), tokens_gradient


def _elements(residual: Residual, placement: Placement) -> float:
    """The elements that a device holds of an array that is split over all devices.

    TPUs hold arrays in tiles of 8 x 128 elements of two axes, which their compiler chooses: here
    those that waste least, of axes with at least 16 elements. The axis of images is one of them
    only for pixels, which then waste nothing.
    """
    size = residual.size / placement.devices
    axes = [n for n in residual.shape if n >= 16]
    if placement.platform != "tpu" or len(axes) < 2 or residual.shape[-1] == 3:
        return size
    axes = axes[1:] if len(axes) > 2 else axes
    return size * min(
        math.ceil(a / 8) * 8 / a * math.ceil(b / 128) * 128 / b
        for a, b in itertools.permutations(axes, 2)
    )


def with_shardings(tree: Any, shardings: Any) -> Any:
    """A tree of shapes, each with its sharding.

    Args:
        tree: a tree of arrays or ``jax.ShapeDtypeStruct``.
        shardings: a tree of the same structure, or one sharding for all; None means one device.
    """
    shapes, structure = jax.tree.flatten(tree)
    leaves = jax.tree.leaves(shardings, is_leaf=lambda x: x is None)
    leaves = leaves * len(shapes) if shardings is None or len(leaves) == 1 else leaves
    return structure.unflatten(
        jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding)
        for x, sharding in zip(shapes, leaves, strict=True)
    )


def shard_elements(array: jax.ShapeDtypeStruct) -> int:
    """The number of elements of one device's shard of an array."""
    sharding = array.sharding
    return math.prod(sharding.shard_shape(array.shape) if sharding else array.shape)
