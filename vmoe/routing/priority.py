"""The order in which the tokens of a group get their slots."""

from typing import Literal, get_args

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from vmoe.errors import UsageError, unknown

Priority = Literal["order", "largest_gate", "sum_of_gates", "random"]
"""Order in which tokens get slots."""
PRIORITIES: tuple[Priority, ...] = get_args(Priority)


def priority_order(
    top_gates: Float[Array, "g s k"], priority: str, draw: Float[Array, "g s"] | None
) -> jax.Array:
    """The tokens of each group, i32 (g, s), most important first.

    Args:
        top_gates: each token's k largest gates, descending.
        priority: "order" is the order in the group; "largest_gate" is Batch Prioritized Routing;
            "sum_of_gates" sums the k gates; "random" sorts by ``draw`` or, without it, uses the
            same fixed order for all groups. Ties keep the order in the group.
        draw: a random number in [0, 1) for each token.

    Raises:
        UsageError: there is no such priority.

    Source: V-MoE section 4 and appendix C.
    """
    if priority == "order":
        return jnp.broadcast_to(jnp.arange(top_gates.shape[1]), top_gates.shape[:2])
    return jax.vmap(descending)(priority_scores(top_gates, priority, draw))


def priority_scores(
    top_gates: Float[Array, "g s k"], priority: str, draw: Float[Array, "g s"] | None
) -> Float[Array, "g s"]:
    """The score of each token, 0 or more; a larger score is more important.

    The arguments are the same as for ``priority_order``.
    """
    g, s, _ = top_gates.shape
    match priority:
        case "order":
            return jnp.zeros((g, s))
        case "largest_gate":
            return top_gates[..., 0]
        case "sum_of_gates":
            return top_gates.sum(-1)
        case "random" if draw is not None:
            return draw
        case "random":
            return jnp.broadcast_to(
                jax.random.uniform(jax.random.key(0), (s,), jnp.float32), (g, s)
            )
    raise UsageError(unknown("no priority", priority, list(PRIORITIES)))


def descending(scores: Float[Array, "s"]) -> Int[Array, "s"]:
    """The indices that sort scores from the largest to the smallest; ties keep their order.

    Equal to ``argsort(-scores)``, which sorts pairs and is slow on a CPU. Here two sorts of single
    integers order by the lower, then by the upper half of a score's bits. The low 16 bits of each
    integer hold its index.

    Args:
        scores: each 0 or more; the two sorts are for float32.

    >>> descending(jnp.array([0.1, 0.5, 0.1, 0.9])).tolist()
    [3, 1, 0, 2]
    """
    s = len(scores)
    if s > 1 << 16 or scores.dtype != jnp.float32:
        return jnp.argsort(-scores, stable=True)
    bits, index = ~jax.lax.bitcast_convert_type(scores, jnp.uint32), jnp.arange(s, dtype=jnp.uint32)
    by_lower = jnp.sort(bits << 16 | index, stable=False) & 0xFFFF
    by_upper = jnp.sort(bits[by_lower] >> 16 << 16 | index, stable=False) & 0xFFFF
    return by_lower[by_upper].astype(jnp.int32)
