"""Every slot is a weighted mean of all tokens, every token a weighted mean of all slots.

There are no choices and no drops, so there is no auxiliary loss and no noise.

Source: "From Sparse to Soft Mixtures of Experts", section 2 and algorithm 1 (arXiv 2308.00951).
"""

import jax
import jax.numpy as jnp

from vmoe.axes import Decision, RouterInputs, SoftRouting
from vmoe.config import MoEConfig


def capacity(config: MoEConfig, s: int) -> int:
    """Slots per expert in a group of s tokens: round(s * capacity_factor / e), at least one."""
    if config.capacity is not None:
        return config.capacity
    return max(1, round(s * config.capacity_factor / config.num_experts))


def route(inputs: RouterInputs, config: MoEConfig, capacity: int) -> Decision:
    """Routes every group independently.

    Args:
        inputs: logits (g, s, e, c). Padding has weight 0 in every slot.
        capacity: unused; slots are parameters, so their number is the same for any image size.
    """
    logits, valid = inputs.logits, inputs.valid[:, :, None, None]
    masked = jnp.where(valid, logits, -jnp.inf)
    # In a group of only padding all logits are -inf, whose softmax is NaN.
    dispatch = jnp.where(valid, jax.nn.softmax(masked, axis=1), 0.0)
    combine = jax.nn.softmax(logits, axis=(2, 3))
    return Decision(combine.sum(-1), SoftRouting(dispatch, combine), {})


route_without_scatters = route
