"""Numbers from routing records."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from vmoe.axes import Record, Routing
from vmoe.routing.groups import ungroup

Scalar = Float[Array, ""]


def choices_and_drops(records: dict[int, Record]) -> tuple[Scalar, Scalar]:
    """The number of choices in all blocks, and how many of them got no slot.

    Expert choice and soft routing drop nothing; soft routing makes no choices.
    """
    made = dropped = jnp.zeros(())
    for record in records.values():
        if isinstance(record.routing, Routing):
            dropped += record.routing.dropped.sum()
            made += (record.routing.dropped | record.routing.kept).sum()
    return made, dropped


def expert_use(record: Record, b: int, devices: int = 1) -> Float[Array, "b e"]:
    """The share of each expert in the kept choices of an image's tokens.

    Sums to 1 over the experts; zeros for an image all of whose choices were dropped. For soft
    routing, each expert's share in the combine weights.

    Args:
        b: images of the batch.
        devices: over which the images are spread; all images of a group are on one device.
    """
    if isinstance(record.routing, Routing):
        e = record.gates.shape[-1]
        at = record.routing.experts[..., None] == jnp.arange(e)
        sent = (at & record.routing.kept[..., None]).sum(axis=2).astype(jnp.float32)
    else:
        sent = record.gates
    images = max(1, -(-b // len(sent)))
    per_image = ungroup(sent, b, sent.shape[1] // images, devices).sum(axis=1)
    return per_image / jnp.maximum(per_image.sum(-1, keepdims=True), 1e-9)


def block_measures(record: Record) -> dict[str, Array]:
    """How evenly one sparse block used its experts, over all real tokens.

    Returns:
        load: share of each expert in the choices, before any is dropped; sums to 1. For soft
            routing, which makes no choices, the same as importance.
        importance: mean gate of each expert; sums to 1.
        dropped: share of the choices that got no slot.
        gate_entropy: mean entropy of a token's gates, in nats; from 0 (sure) to ln e.
    """
    real = record.valid[..., None]
    tokens = jnp.maximum(record.valid.sum(), 1)
    importance = jnp.where(real, record.gates, 0.0).sum((0, 1)) / tokens
    made, dropped = choices_and_drops({0: record})
    if isinstance(record.routing, Routing):
        none = record.gates.shape[-1]  # the number that stands for no expert
        chosen = jnp.zeros(none + 1).at[record.routing.experts].add(1)
        load = chosen[:none] / jnp.maximum(made, 1)
    else:
        load = importance
    entropy = -jnp.where(real, jax.scipy.special.xlogy(record.gates, record.gates), 0.0).sum()
    return {
        "load": load,
        "importance": importance,
        "dropped": dropped / jnp.maximum(made, 1),
        "gate_entropy": entropy / tokens,
    }
