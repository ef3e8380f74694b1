"""Routing without scatters, gathers or sorts of tokens: dispatch and combine as dense arrays.

For export formats without these operations (ONNX). The decisions are the same as in
``token_choice`` and ``expert_choice``. The time is quadratic in the tokens of a group.
"""

import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from vmoe.axes import SoftRouting
from vmoe.config import ExpertChoice, MoEConfig, TokenChoice
from vmoe.errors import UsageError
from vmoe.routing.priority import priority_scores
from vmoe.routing.top_k import top_k


def one_hot_routing(gates: Float[Array, "g s e"], config: MoEConfig, capacity: int) -> SoftRouting:
    """The decisions of the layer's router, for groups without padding.

    Args:
        gates: in [0, 1].
        config: config of the layer.
        capacity: slots per expert and group.

    Returns:
        ``dispatch`` is 1 for the token in a slot, ``combine`` is its weight; both are 0 for others.

    Raises:
        UsageError: the router is neither token choice nor expert choice.
    """
    router, weights = config.router, gates
    match router:
        case TokenChoice():
            filled = _token_choice(gates, router, capacity)
            if router.normalize_weights:
                weights = gates / top_k(gates, router.k)[0].sum(axis=-1, keepdims=True)
        case ExpertChoice():
            _, tokens = top_k(jnp.swapaxes(gates, 1, 2), capacity)
            filled = tokens[:, None] == jnp.arange(gates.shape[1])[:, None, None]
        case _:
            raise UsageError(f"router {router.kind}: it cannot be computed without scatters")
    dispatch = filled.astype(gates.dtype)
    return SoftRouting(dispatch, weights[..., None] * dispatch)


def _token_choice(
    gates: Float[Array, "g s e"], router: TokenChoice, capacity: int
) -> Bool[Array, "g s e c"]:
    """Whether a token is in a slot: lower ranks go first, then higher priority within a rank."""
    _, s, e = gates.shape
    top_gates, experts = top_k(gates, router.k)
    chosen = (experts[..., None] == jnp.arange(e)).astype(gates.dtype)  # g s k e
    scores = priority_scores(top_gates, router.priority, None)
    own, other = scores[:, :, None], scores[:, None, :]
    earlier = jnp.arange(s) < jnp.arange(s)[:, None]
    before = (other > own) | ((other == own) & earlier)  # g s s: the second token before the first
    same_rank = jnp.einsum("gst,gtke->gske", before.astype(gates.dtype), chosen)
    per_rank = chosen.sum(axis=1, keepdims=True)
    lower_ranks = jnp.cumsum(per_rank, axis=2) - per_rank
    position = (chosen * (same_rank + lower_ranks)).sum(axis=2)
    at_expert = chosen.sum(axis=2) > 0
    return at_expert[..., None] & (position[..., None] == jnp.arange(capacity))
