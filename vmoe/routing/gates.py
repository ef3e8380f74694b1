"""From the router's logits to its gates."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int, Key


def noise(key: Key[Array, ""], shape: tuple[int, ...], std: float) -> Float[Array, "g s e"]:
    """The router's noise in training: N(0, (std / e)^2) for logits (g, s, e).

    Source: V-MoE section 2.1, equation 2 (std = 1).
    """
    return jax.random.normal(key, shape) * (std / shape[-1])


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


def priority_order(
    top_gates: Float[Array, "g s k"], priority: str, draw: Float[Array, "g s"] | None
) -> jax.Array:
    """The tokens of each group, i32 (g, s), most important first.

    Args:
        top_gates: each token's k largest gates, descending.
        priority: "order" keeps the place in the group; "largest_gate" is Batch Prioritized
            Routing; "sum_of_gates" sums the k gates; "random" is the order of the draw, or the
            same one for every group where there is none. Equal scores keep their place.
        draw: a random number in [0, 1) for each token.

    Source: V-MoE section 4 and appendix C.
    """
    g, s, _ = top_gates.shape
    match priority:
        case "order":
            return jnp.broadcast_to(jnp.arange(s), (g, s))
        case "largest_gate":
            score = top_gates[..., 0]
        case "sum_of_gates":
            score = top_gates.sum(-1)
        case "random" if draw is None:
            score = jnp.broadcast_to(jax.random.uniform(jax.random.key(0), (s,)), (g, s))
        case "random":
            score = draw
        case _:
            raise ValueError(f"unknown priority {priority!r}")
    return jax.vmap(descending)(score)


def descending(scores: Float[Array, "s"]) -> Int[Array, "s"]:
    """The order of scores, from the largest to the smallest; equal ones keep theirs.

    As ``argsort(-scores)``, whose two operands make it a slow sort on a CPU: here two sorts of
    integers, by the lower and then by the upper half of a score's bits, with its place below them.

    Args:
        scores: float32, none negative.

    >>> descending(jnp.array([0.1, 0.5, 0.1, 0.9])).tolist()
    [3, 1, 0, 2]
    """
    s = len(scores)
    if s > 1 << 16:
        return jnp.argsort(-scores, stable=True)
    bits, place = ~jax.lax.bitcast_convert_type(scores, jnp.uint32), jnp.arange(s, dtype=jnp.uint32)
    by_lower = jnp.sort(bits << 16 | place, stable=False) & 0xFFFF
    by_upper = jnp.sort(bits[by_lower] >> 16 << 16 | place, stable=False) & 0xFFFF
    return by_lower[by_upper].astype(jnp.int32)


def mask_gates(gates: Float[Array, "g s e"], valid: Bool[Array, "g s"]) -> Float[Array, "g s e"]:
    """Gates with those of padding below every real one, so that padding is chosen last."""
    return jnp.where(valid[..., None], gates, -1.0)
