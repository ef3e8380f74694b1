"""The scores and gates of each token, the largest of them, and their indices."""

from typing import Literal

import jax
from jaxtyping import Array, Bool, Float

from vmoe.axes import RouterInputs

MASKED = -1e9
"""The logit of a masked expert, whose gate is 0. An infinite one would make NaN in soft routing."""
Scores = Literal["sigmoid", "softmax"]
"""The function from logits to scores."""


def gates_of(logits: Float[Array, "g s e"]) -> Float[Array, "g s e"]:
    """Softmax over the experts; values in [0, 1] that sum to 1 for each token."""
    return jax.nn.softmax(logits, axis=-1)


def scores_and_gates(
    logits: Float[Array, "g s e"], scores: Scores
) -> tuple[Float[Array, "g s e"], Float[Array, "g s e"]]:
    """The scores, and the gates: the scores divided by their sum over the experts."""
    if scores == "softmax":
        gates = gates_of(logits)
        return gates, gates
    # Of scores that all round to 0 the gates are uniform.
    return jax.nn.sigmoid(logits), gates_of(jax.nn.log_sigmoid(logits))


def choosable(inputs: RouterInputs) -> Bool[Array, "g s e"]:
    """Whether a token may have an expert: False for padding and for masked experts."""
    return inputs.valid[..., None] & (inputs.logits > MASKED)


def top_k(values: Float[Array, "*g y"], k: int) -> tuple[jax.Array, jax.Array]:
    """The k largest values along the last axis, descending, and their indices; ties keep order.

    This is ``jax.lax.top_k`` with an optimization barrier. Without it, XLA's CPU backend rewrites a
    top-k whose result is sliced (such as the largest gate of each token) as a full sort, which
    takes thirty times as long.
    """
    largest, indices = jax.lax.top_k(values, k)
    barrier = jax.lax.optimization_barrier  # one per array: a joint one crashes XLA in shard_map
    return barrier(largest), barrier(indices)
