"""Sorted rows: the kept choices of all groups in one array, sorted by expert.

Slots of fixed capacity cost the same whether they are filled or not. Rows exist only for kept
choices, so empty slots cost nothing, also in dropless layers. Each expert's rows begin at a
multiple of the block size, so each block belongs to one expert.
"""

import functools

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from vmoe.axes import Routing, SoftRouting
from vmoe.routing.indexing import divide, rows_at
from vmoe.routing.queues import invert, queue

LARGEST_BLOCK = 4096
"""Maximum number of rows of a block; the hidden layer of a larger one does not fit in the cache."""


@functools.partial(jax.jit, static_argnames="block", inline=True)
def sort_rows(routing: Routing, *, block: int) -> tuple[Routing, Int[Array, "e"]]:
    """The routing of all groups as one group with a single "expert", whose slots are sorted rows.

    The rows are sorted by expert, then by group, then by slot. ``layout`` dispatches and combines
    rows in the same way as slots.

    Args:
        block: number of rows of a block; each expert's number of rows is padded to a multiple.

    Returns:
        the routing, (1, g s, k) with choices (1, 1, r), and the number of rows of each expert.
    """
    g, s, k = routing.slots.shape
    _, e, c = routing.choices.shape
    r = most_rows(routing, block)
    kept = routing.kept  # g s k
    counts = routing.filled.sum(axis=2, dtype=jnp.int32)  # g e
    sizes = -(-counts.sum(axis=0) // block) * block  # e
    before = jnp.cumsum(sizes) - sizes + jnp.cumsum(counts, axis=0) - counts  # g e
    start = rows_at(before, routing.experts, within=True)  # g s k
    row = jnp.where(kept, start + divide(routing.slots, c)[1], r)
    choices = invert(row.reshape(1, -1), r)
    flat = Routing(
        experts=jnp.where(kept, 0, 1).reshape(1, g * s, k),
        slots=row.reshape(1, g * s, k),
        choices=choices.reshape(1, 1, r),
        weights=routing.weights.reshape(1, g * s, k),
    )
    return flat, sizes


def block_size(
    routing: Routing, implementation: str, platform: str, choices: int | None = None
) -> int:
    """Number of rows of a block: small enough to avoid padding, large enough to reuse weights.

    If an expert has about as many slots as choices, its slots form one block, or several of at
    most ``LARGEST_BLOCK`` rows. If it has many more slots, a block has a quarter of an even share
    of the choices: at most 512 in a loop, and at least 512, or all slots of an expert, where each
    block has a copy of its expert's kernels. By the published rates of an H100, copying a kernel
    takes as long as multiplying 700 rows by it.

    Args:
        implementation: "blocked" or "ragged", which has blocks on a GPU only; elsewhere 1 row each.
        platform: "cpu", "gpu" or "tpu".
        choices: how many are expected; all of the routing if None.
    """
    if implementation == "ragged" and platform != "gpu":
        return 1
    g, s, k = routing.slots.shape
    _, e, c = routing.choices.shape
    even = -(-min(g * s * k, g * e * c, choices or g * s * k) // e)
    if g * c <= 1.25 * even + 8:
        parts = -(-g * c // LARGEST_BLOCK)
        return -(-g * c // (8 * parts)) * 8
    least, most = (16, 512) if implementation == "blocked" else (512, LARGEST_BLOCK)
    return min(most, max(least, -(-even // 32) * 8), -(-g * c // 8) * 8)


def most_rows(routing: Routing, block: int) -> int:
    """The maximum number of rows, where each expert's number is padded to a multiple of a block."""
    g, s, k = routing.slots.shape
    _, e, c = routing.choices.shape
    choices = min(g * s * k, g * e * c)
    return block * min(e * -(-g * c // block), (choices + e * (block - 1)) // block)


@functools.partial(jax.jit, static_argnames="n", inline=True)
def keep_class_tokens(
    groups: Float[Array, "g s d"], routing: Routing | SoftRouting, n: int
) -> tuple[Float[Array, "g x d"], Routing | SoftRouting]:
    """The routing of class tokens only: the first of each image's n tokens.

    Kept choices stay kept, with their weights, and move up in their queues.

    Returns:
        the tokens to dispatch (all of them with soft routing), and the routing.
    """
    if isinstance(routing, SoftRouting):
        return groups, SoftRouting(routing.dispatch, routing.combine[:, ::n])
    _, e, c = routing.choices.shape
    experts = jnp.where(routing.kept, routing.experts, e)[:, ::n]  # g x k: of class tokens
    i = experts.shape[1]
    order = jnp.broadcast_to(jnp.arange(i), experts.shape[:2])
    slots, choices = queue(experts, order, e=e, c=min(c, i))
    return groups[:, ::n], Routing(experts, slots, choices, routing.weights[:, ::n])
