"""The largest gates of each token, and where they are."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float


def gates_of(logits: Float[Array, "g s e"]) -> Float[Array, "g s e"]:
    """Softmax over the experts; values in [0, 1] that sum to 1 for each token."""
    return jax.nn.softmax(logits, axis=-1)


def top_k(values: Float[Array, "*g y"], k: int) -> tuple[jax.Array, jax.Array]:
    """The k largest of the last axis, descending, and where they are; equal ones in their order.

    As ``jax.lax.top_k``, behind a barrier: a slice of its result, such as the largest gate of
    each token, would turn it into a sort of everything on a CPU, thirty times as slow.
    """
    largest, places = jax.lax.top_k(values, k)
    barrier = jax.lax.optimization_barrier  # one for each: XLA crashes on one for both in shard_map
    return barrier(largest), barrier(places)


def mask_gates(gates: Float[Array, "g s e"], valid: Bool[Array, "g s"]) -> Float[Array, "g s e"]:
    """Gates with those of padding below every real one, so that padding is chosen last."""
    return jnp.where(valid[..., None], gates, -1.0)
