"""Every slot is a weighted mean of all tokens, every token a weighted mean of all slots.

Nothing is chosen and nothing dropped, so there is no auxiliary loss and no noise.

Source: "From Sparse to Soft Mixtures of Experts", section 2 and algorithm 1 (arXiv 2308.00951).
"""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from vmoe.axes import Decision, SoftRouting
from vmoe.config import MoEConfig


def capacity(config: MoEConfig, s: int) -> int:
    """Slots per expert in a group of s tokens: round(s * capacity_factor / e), at least one."""
    if config.capacity is not None:
        return config.capacity
    return max(1, round(s * config.capacity_factor / config.num_experts))


def route(logits: Float[Array, "g s e c"], valid: Bool[Array, "g s"]) -> Decision:
    """Routes every group by itself; see ``Decision``.

    Args:
        logits: of every token at every slot, float32.
        valid: False for padding, which has no share in any slot.
    """
    masked = jnp.where(valid[:, :, None, None], logits, -jnp.inf)
    # A group of padding alone has only -inf, whose softmax would be NaN.
    dispatch = jnp.where(valid[:, :, None, None], jax.nn.softmax(masked, axis=1), 0.0)
    combine = jax.nn.softmax(logits, axis=(2, 3))
    return Decision(combine.sum(-1), SoftRouting(dispatch, combine), {})
