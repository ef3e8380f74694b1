"""What becomes of the choices of token choice that find no free slot.

drop: nothing; the token does without that expert. next_expert: the token tries its next-ranked
experts, one rank after another, until it has k slots. One rule says both for all e ranks: in the
order of priority, a token with fewer than k slots takes one at its expert of that rank, if there is
room. So the first k ranks are those of token choice, and no moved choice takes a slot from them.

To pool the slots of several groups is to make one larger group of them (``images_per_group``).
"""

from typing import Literal

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from vmoe.axes import Routing
from vmoe.routing.queues import invert, queue
from vmoe.routing.top_k import top_k

Overflow = Literal["drop", "next_expert"]
"""What becomes of choices without a free slot."""


def to_next_experts(
    routing: Routing,
    gates: Float[Array, "g s e"],
    valid: Bool[Array, "g s"],
    order: Int[Array, "g s"],
    limits: Int[Array, "e"] | None = None,
) -> tuple[Int[Array, "g s k"], Int[Array, "g s k"], Int[Array, "g e c"]]:
    """Moves dropped choices to the next-ranked experts with room.

    An expert whose gate is 0, such as a masked one, gets none.

    Args:
        routing: the routing of the k largest gates.
        valid: False for padding, which never takes a slot.
        order: the tokens of each group, most important first.
        limits: slots of each expert, at most c; c if None.

    Returns:
        ``experts``, ``slots`` and ``choices`` of the new Routing. A choice that found no room keeps
        the expert that the token wanted.
    """
    (g, _, k), (_, e, c) = routing.slots.shape, routing.choices.shape
    ranked_gates, ranked = top_k(jax.lax.stop_gradient(gates), e)  # g s e
    ends = jnp.arange(e + 1) * c + jnp.pad(jnp.full(e, c) if limits is None else limits, (0, 1))
    wanted = jnp.where(valid[..., None] & (ranked_gates > 0), ranked, e)

    def one_rank(
        state: tuple[jax.Array, jax.Array, jax.Array], wanted: Int[Array, "g s"]
    ) -> tuple[tuple[jax.Array, jax.Array, jax.Array], None]:
        experts, slots, used = state  # g s k, g s k, g e + 1
        dropped = slots == e * c
        wanted = jnp.where(dropped.any(-1), wanted, e)
        place, _ = queue(wanted[..., None], order, e=e, c=c)  # in the queue of this rank alone
        place = place[..., 0] + jnp.take_along_axis(used, wanted, axis=1)
        gets = (wanted < e) & (place < ends[wanted])  # g s
        moved = gets[..., None] & (jnp.arange(k) == dropped.argmax(-1)[..., None])  # the first one
        experts = jnp.where(moved, wanted[..., None], experts)
        slots = jnp.where(moved, place[..., None], slots)
        at = gets[..., None] & (wanted[..., None] == jnp.arange(e + 1))  # g s e + 1
        used += at.sum(1, dtype=jnp.int32)
        return (experts, slots, used), None

    filled = routing.filled.sum(-1, dtype=jnp.int32)  # g e
    used = jnp.pad(filled, ((0, 0), (0, 1)))  # g e + 1
    later = jnp.moveaxis(wanted[..., k:], -1, 0)
    start = (routing.experts, routing.slots, used)
    (experts, slots, _), _ = jax.lax.scan(one_rank, start, later)
    return experts, slots, invert(slots.reshape(g, -1), e * c).reshape(g, e, c)
