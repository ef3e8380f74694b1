"""The routers that ONNX files can have, without scatters, gathers or sorts of tokens.

Dispatch and combine are dense arrays. The time is quadratic in the tokens of a group.
"""

from collections.abc import Callable, Mapping
from typing import Any

import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from vmoe.axes import Decision, RouterInputs, SoftRouting
from vmoe.routing.expert_choice import ExpertChoice
from vmoe.routing.priority import priority_scores
from vmoe.routing.router import AnyRouter
from vmoe.routing.soft import Soft
from vmoe.routing.token_choice import TokenChoice
from vmoe.routing.top_k import gates_of, top_k


def token_choice(router: TokenChoice, inputs: RouterInputs, c: int) -> Decision:
    """The decisions of the router, if it drops choices without a free slot."""
    weights = gates = gates_of(inputs.logits)
    top_gates, experts = top_k(gates, router.k)
    scores = priority_scores(top_gates, router.priority, None)
    if router.normalize_weights:
        weights = gates / top_gates.sum(axis=-1, keepdims=True)
    filled = one_hot_queue(experts, scores, e=gates.shape[-1], c=c)
    limits = router.limits(c, inputs.valid.shape[1])
    if limits is not None:
        filled &= jnp.arange(c) < limits[:, None]
    return Decision(gates, one_hot_routing(filled, weights))


def expert_choice(router: ExpertChoice, inputs: RouterInputs, c: int) -> Decision:
    """The decisions of the router."""
    gates = gates_of(inputs.logits)
    _, tokens = top_k(jnp.swapaxes(gates, 1, 2), c)  # g e c
    filled = tokens[:, None] == jnp.arange(gates.shape[1])[:, None, None]
    if inputs.state is not None:
        filled &= router.taken(inputs)[..., None]
    return Decision(gates, one_hot_routing(filled, gates))


ROUTERS: Mapping[type[AnyRouter], Callable[[Any, RouterInputs, int], Decision]] = {
    TokenChoice: token_choice,
    ExpertChoice: expert_choice,
    Soft: Soft.__call__,
}
"""By class, a router's decisions in evaluation for groups without padding, as ``SoftRouting``."""


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
