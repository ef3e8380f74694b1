"""The queue of choices at each expert: a choice's position in it is its slot.

Queueing takes one integer sort for any number of experts (a priority by score takes two more, over
the tokens). A choice's sort key is its expert, then its rank, then its token's index in the
priority order. So each expert's queue is contiguous in the sorted keys, and a choice's position in
the queue is its slot.
"""

import functools

import jax
import jax.numpy as jnp
from jaxtyping import Array, Int

from vmoe.errors import UsageError


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
    _, s, k = experts.shape
    if (e + 1) * s * k >= 2**31:
        raise UsageError(
            f"{s * k:,} choices of {e} experts or devices are too many to sort: "
            "lower images_per_group, the layer's group, or the batch"
        )
    return jax.vmap(functools.partial(_queue, e=e, c=c))(experts, order)


def invert(places: Int[Array, "*g x"], size: int) -> Int[Array, "*g size"]:
    """What is at each of ``size`` places, from the place of each thing; x where there is none.

    Slots are the inverse of choices, and choices of slots.

    Args:
        places: all different, but for things at no place, whose number is at least ``size``.
    """

    def of_group(places: Int[Array, "x"]) -> Int[Array, "size"]:
        numbers = jnp.arange(len(places), dtype=jnp.int32)
        return jnp.full(size, len(places), jnp.int32).at[places].set(numbers, mode="drop")

    return jnp.vectorize(of_group, signature="(x)->(y)")(places)


def _queue(
    experts: Int[Array, "s k"], order: Int[Array, "s"], *, e: int, c: int
) -> tuple[Int[Array, "s k"], Int[Array, "e c"]]:
    s, k = experts.shape
    place = jnp.zeros(s, jnp.int32)
    place = place.at[order].set(jnp.arange(s, dtype=jnp.int32), unique_indices=True)  # s
    ranks = jnp.arange(k, dtype=jnp.int32)
    turn = ranks * s + place[:, None]  # s k: all first choices come before any second one
    sort_keys = experts.astype(jnp.int32) * (s * k) + turn
    queue = jnp.sort(sort_keys.reshape(-1), stable=False)  # sk

    expert, turn = queue // (s * k), queue % (s * k)  # sk
    choice = order[turn % s] * k + turn // s  # sk: token * k + rank
    first_keys = jnp.arange(e + 1) * (s * k)
    # Comparing all takes one operation of an accelerator; a binary search is a loop there.
    starts = jnp.searchsorted(queue, first_keys, method="compare_all")  # e + 1: of each queue
    position = jnp.arange(s * k, dtype=jnp.int32) - starts[expert]  # sk: place in that queue
    slot = jnp.where((expert < e) & (position < c), expert * c + position, e * c)  # sk
    slots = jnp.zeros(s * k, jnp.int32).at[choice].set(slot, unique_indices=True).reshape(s, k)

    source = starts[:e, None] + jnp.arange(c)  # e c: index into the sorted choices
    choices = jnp.where(source < starts[1:, None], choice[jnp.minimum(source, s * k - 1)], s * k)
    return slots, choices
