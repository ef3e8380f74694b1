"""Numbers out of routing records."""

import jax.numpy as jnp
from einops import rearrange
from jaxtyping import Array, Float

from vmoe.axes import Record, Routing

Scalar = Float[Array, ""]


def choices_and_drops(records: dict[int, Record]) -> tuple[Scalar, Scalar]:
    """How many choices all blocks' tokens made, and how many of them got no slot.

    Where experts choose or the routing is soft nothing is chosen and then dropped.
    """
    made = dropped = jnp.zeros(())
    for record in records.values():
        if isinstance(record.routing, Routing):
            dropped += record.routing.dropped.sum()
            made += (record.routing.dropped | record.routing.kept).sum()
    return made, dropped


def expert_use(record: Record, b: int) -> Float[Array, "b e"]:
    """The share of each expert in the rows that an image's tokens sent to experts.

    Sums to 1 over the experts; zeros for an image of which every choice was dropped. For soft
    routing, each expert's share in the combine weights.

    Args:
        b: images of the batch.
    """
    if isinstance(record.routing, Routing):
        e = record.gates.shape[-1]
        at = record.routing.experts[..., None] == jnp.arange(e)
        sent = (at & record.routing.kept[..., None]).sum(axis=2)
    else:
        sent = record.gates
    images = -(-b // len(sent))
    per_image = rearrange(sent, "g (i n) e -> (g i) n e", i=images).sum(axis=1)[:b]
    return per_image / jnp.maximum(per_image.sum(-1, keepdims=True), 1e-9)
