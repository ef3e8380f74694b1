"""Statistics of routing records."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from vmoe.axes import Record, Routing
from vmoe.routing.groups import images_in_group, ungroup

Scalar = Float[Array, ""]


def choices_and_drops(records: dict[int, Record]) -> tuple[Scalar, Scalar]:
    """The number of choices in all blocks, and the number that got no slot.

    Expert choice and soft routing drop nothing; soft routing makes no choices.
    """
    choices = dropped = jnp.zeros(())
    for record in records.values():
        if isinstance(record.routing, Routing):
            dropped += record.routing.dropped.sum()
            choices += (record.routing.dropped | record.routing.kept).sum()
    return choices, dropped


def tokens_and_unprocessed(records: dict[int, Record]) -> tuple[Scalar, Scalar]:
    """The number of tokens in all blocks, and the number that no expert processed.

    They keep the value that the residual connection carries. Soft routing processes all tokens.
    """
    tokens = unprocessed = jnp.zeros(())
    for record in records.values():
        tokens += record.valid.sum()
        if isinstance(record.routing, Routing):
            unprocessed += (record.valid & ~record.routing.kept.any(-1)).sum()
    return tokens, unprocessed


def expert_use(record: Record, b: int, devices: int = 1) -> Float[Array, "b e"]:
    """The fraction of an image's kept choices that go to each expert.

    Sums to 1 over the experts; zeros if all choices of an image were dropped. For soft routing,
    each expert's fraction of the combine weights.

    Args:
        b: number of images in the batch.
        devices: number of devices that the images are split over; all images of a group are on one.
    """
    use = record.gates
    if isinstance(record.routing, Routing):
        use = processing_experts(record.routing).astype(jnp.float32)
    n = use.shape[1] // images_in_group(b, len(use))
    per_image = ungroup(use, b, n, devices).sum(axis=1)
    return per_image / jnp.maximum(per_image.sum(-1, keepdims=True), 1e-9)


def processing_experts(routing: Routing) -> Bool[Array, "g s e"]:
    """Which experts process each token."""
    e = routing.choices.shape[1]
    one_hot = routing.experts[..., None] == jnp.arange(e)
    return (one_hot & routing.kept[..., None]).any(axis=2)


def choices_per_expert(routing: Routing) -> Float[Array, "e"]:
    """The number of choices of each expert, before any is dropped."""
    e = routing.choices.shape[1]  # also the index that means no expert
    return jnp.zeros(e + 1).at[routing.experts].add(1)[:e]


def block_measures(record: Record) -> dict[str, Array]:
    """How evenly one sparse block used its experts, over all real tokens.

    Returns:
        load: fraction of the choices per expert, before any is dropped; sums to 1. Equal to
            importance for soft routing, which makes no choices.
        importance: mean gate of each expert; sums to 1.
        dropped: fraction of the choices that got no slot.
        unprocessed: fraction of the tokens that no expert processed.
        gate_entropy: mean entropy of a token's gates, in nats; from 0 (one expert) to ln e (even).
    """
    totals = expert_totals(record)
    tokens = jnp.maximum(totals["tokens"], 1)
    choices = jnp.maximum(totals["choices"].sum(), 1)
    importance = totals["gates"] / tokens
    makes_choices = isinstance(record.routing, Routing)
    return {
        "load": totals["choices"] / choices if makes_choices else importance,
        "importance": importance,
        "dropped": (totals["choices"] - totals["kept"]).sum() / choices,
        "unprocessed": totals["unprocessed"] / tokens,
        "gate_entropy": totals["entropy"] / tokens,
    }


def expert_totals(record: Record) -> dict[str, Array]:
    """The fields of ``ExpertTotals`` of one sparse block, over all real tokens."""
    real, gates = record.valid[..., None], record.gates
    choices = kept = jnp.zeros(gates.shape[-1], jnp.int32)
    unprocessed = jnp.int32(0)
    if isinstance(record.routing, Routing):
        choices = choices_per_expert(record.routing).astype(jnp.int32)
        kept = (record.routing.choices < record.routing.slots[0].size).sum((0, 2))
        unprocessed = (record.valid & ~record.routing.kept.any(-1)).sum()
    return {
        "tokens": record.valid.sum(),
        "gates": jnp.where(real, gates, 0.0).sum((0, 1)),
        "entropy": -jnp.where(real, jax.scipy.special.xlogy(gates, gates), 0.0).sum(),
        "choices": choices,
        "kept": kept,
        "unprocessed": unprocessed,
    }
