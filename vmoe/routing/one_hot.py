"""Dispatch and combine as dense arrays, without scatters, gathers or sorts of tokens.

For export formats without these operations (ONNX). The time is quadratic in the tokens of a group.
"""

import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from vmoe.axes import SoftRouting


def one_hot_routing(filled: Bool[Array, "g s e c"], weights: Float[Array, "g s e"]) -> SoftRouting:
    """The routing for given slots.

    Args:
        filled: whether a token is in a slot.
        weights: the combine weight of each expert for each token that has a slot there.

    Returns:
        ``dispatch`` is 1 for the token in a slot, ``combine`` is its weight; both are 0 for others.
    """
    dispatch = filled.astype(weights.dtype)
    return SoftRouting(dispatch, weights[..., None] * dispatch)


def one_hot_queue(
    experts: Int[Array, "g s k"], scores: Float[Array, "g s"], *, e: int, c: int
) -> Bool[Array, "g s e c"]:
    """Whether a token is in a slot: lower ranks go first, then higher scores within a rank.

    The same slots as those of ``queues.queue``.

    Args:
        experts: the expert of each choice, all different for a token.
        scores: the priority of each token; ties keep the order in the group.
    """
    s = scores.shape[1]
    chosen = (experts[..., None] == jnp.arange(e)).astype(scores.dtype)  # g s k e
    own, other = scores[:, :, None], scores[:, None, :]
    earlier = jnp.arange(s) < jnp.arange(s)[:, None]
    before = (other > own) | ((other == own) & earlier)  # g s s: the second token before the first
    same_rank = jnp.einsum("gst,gtke->gske", before.astype(scores.dtype), chosen)
    per_rank = chosen.sum(axis=1, keepdims=True)
    lower_ranks = jnp.cumsum(per_rank, axis=2) - per_rank
    position = (chosen * (same_rank + lower_ranks)).sum(axis=2)
    at_expert = chosen.sum(axis=2) > 0
    return at_expert[..., None] & (position[..., None] == jnp.arange(c))
