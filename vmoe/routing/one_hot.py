"""Routing without sorts of tokens, scatters or gathers: dispatch and combine as dense arrays.

For formats of programs that cannot express those. The decisions are the same; the time is
quadratic in the tokens of a group, and there is no noise, padding or gradient.
"""

import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from vmoe.axes import SoftRouting
from vmoe.config import MoEConfig, TokenChoice
from vmoe.routing.priority import priority_scores
from vmoe.routing.top_k import top_k


def one_hot_routing(gates: Float[Array, "g s e"], config: MoEConfig, capacity: int) -> SoftRouting:
    """The routing that the layer's router decides, one-hot.

    Args:
        gates: in [0, 1].
        config: of the layer, with a router that reads logits per expert.
        capacity: slots per expert and group.

    Returns:
        ``dispatch`` is 1 for the token in a slot and 0 for others; ``combine`` is its weight there.
    """
    router, weights = config.router, gates
    if isinstance(router, TokenChoice):
        top_gates, _ = top_k(gates, router.k)
        filled = _queue(gates, router, capacity)
        if router.normalize_weights:
            weights = gates / top_gates.sum(-1, keepdims=True)
    else:
        _, tokens = top_k(jnp.swapaxes(gates, 1, 2), capacity)
        filled = tokens[:, None] == jnp.arange(gates.shape[1])[:, None, None]
    dispatch = filled.astype(gates.dtype)
    return SoftRouting(dispatch, weights[..., None] * dispatch)


def _queue(gates: Float[Array, "g s e"], router: TokenChoice, c: int) -> Bool[Array, "g s e c"]:
    """Which token is in which slot: each waits behind all lower ranks, then by priority."""
    _, s, e = gates.shape
    top_gates, experts = top_k(gates, router.k)
    chosen = experts[..., None] == jnp.arange(e)  # g s k e
    ones = chosen.astype(gates.dtype)
    scores = priority_scores(top_gates, router.priority, None)
    own, other = scores[:, :, None], scores[:, None, :]
    earlier = jnp.arange(s) < jnp.arange(s)[:, None]
    before = (other > own) | ((other == own) & earlier)  # g s s: the second is served first
    ahead = jnp.einsum("gst,gtke->gske", before.astype(gates.dtype), ones)
    per_rank = ones.sum(axis=1, keepdims=True)
    lower_ranks = jnp.cumsum(per_rank, axis=2) - per_rank
    position = (ones * (ahead + lower_ranks)).sum(axis=2)
    return chosen.any(axis=2)[..., None] & (position[..., None] == jnp.arange(c))
