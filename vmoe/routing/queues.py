"""The queue of choices at each expert: a choice's position in it is its slot.

Queueing takes one integer sort for any number of experts (a priority by score takes two more, over
the tokens). A choice's sort key is its expert, then its rank, then its token's index in the
priority order. So each expert's queue is contiguous in the sorted keys, and a choice's position in
the queue is its slot.
"""

import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Int

from vmoe.errors import UsageError
from vmoe.routing.indexing import divide, placed, rows_at


def queue(
    experts: Int[Array, "g s k"], order: Int[Array, "g s"], *, e: int, c: int
) -> tuple[Int[Array, "g s k"], Int[Array, "g e c"]]:
    """Queues choices at their experts; returns ``slots`` and ``choices`` of the Routing.

    Args:
        experts: the expert of each choice; e for none.
        order: the tokens of each group, most important first.

    Raises:
        UsageError: a group has too many tokens and experts for 32-bit sort keys.
    """
    g, s, k = experts.shape
    if (e + 1) * s * k >= 2**31:
        raise UsageError(
            f"{s * k:,} choices of {e} experts or devices are too many to sort: "
            "lower images_per_group, the layer's group, or the batch"
        )
    sk = s * k  # a choice is token * k + rank
    rank = lax.broadcasted_iota(jnp.int32, experts.shape, 2)
    place = invert(order, s, within=True)  # g s
    turn = rank * s + place[..., None]  # g s k: all first choices come before any second one
    sort_keys = experts.astype(jnp.int32) * sk + turn
    queued = lax.sort(sort_keys.reshape(g, sk), is_stable=False)  # g sk

    expert, turn = divide(queued, sk)
    rank, importance = divide(turn, s)
    choice = rows_at(order, importance, within=True) * k + rank
    first_keys = lax.iota(jnp.int32, e + 1) * sk
    # Comparing all takes one operation of an accelerator; a binary search is a loop there.
    starts = (queued[:, None] < first_keys[:, None]).sum(2, dtype=jnp.int32)  # g e + 1: of queues
    position = lax.iota(jnp.int32, sk) - rows_at(starts, expert, within=True)  # in that queue
    slot = jnp.where((expert < e) & (position < c), expert * c + position, e * c)
    slots = placed(slot, choice, sk, 0, within=True).reshape(g, s, k)

    source = starts[:, :e, None] + lax.iota(jnp.int32, c)  # g e c: index into the sorted choices
    found = rows_at(choice, source, within=True)
    return slots, jnp.where(source < starts[:, 1:, None], found, sk)


def invert(places: Int[Array, "g x"], size: int, *, within: bool = False) -> Int[Array, "g size"]:
    """What is at each of ``size`` places, from the place of each thing; x where there is none.

    Slots are the inverse of choices, and choices of slots.

    Args:
        places: all different, but for things at no place, whose number is at least ``size``.
        within: all things have a place.
    """
    things = lax.broadcasted_iota(jnp.int32, places.shape, 1)
    return placed(things, places, size, places.shape[1], within=within)
