"""Statistics of routing records."""

from collections.abc import Iterable

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from vmoe.axes import Record, Routing
from vmoe.routing.groups import images_in_group, ungroup

Scalar = Float[Array, ""]


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
        "entropy": jnp.where(real, jax.scipy.special.entr(gates), 0.0).sum(),
        "choices": choices,
        "kept": kept,
        "unprocessed": unprocessed,
    }


def dropped_and_unprocessed(blocks: Iterable[dict[str, Array]]) -> tuple[Scalar, Scalar]:
    """Fraction of the choices that got no slot, and of the tokens that no expert processed.

    Such tokens keep the value that the residual connection carries. Expert choice and soft routing
    drop nothing; soft routing makes no choices and processes all tokens.

    Args:
        blocks: the ``expert_totals`` of sparse blocks, over which the fractions are taken.
    """
    blocks = list(blocks)
    choices = sum(totals["choices"].sum() for totals in blocks)
    kept = sum(totals["kept"].sum() for totals in blocks)
    tokens = sum(totals["tokens"] for totals in blocks)
    unprocessed = sum(totals["unprocessed"] for totals in blocks)
    return (choices - kept) / jnp.maximum(choices, 1), unprocessed / jnp.maximum(tokens, 1)


def block_measures(totals: dict[str, Array]) -> dict[str, Array]:
    """How evenly one sparse block used its experts, over all real tokens.

    Args:
        totals: the ``expert_totals`` of the block.

    Returns:
        load: fraction of the choices per expert, before any is dropped; sums to 1. Equal to
            importance for soft routing, which makes no choices.
        importance: mean gate of each expert; sums to 1.
        dropped, unprocessed: see ``dropped_and_unprocessed``.
        gate_entropy: mean entropy of a token's gates, in nats; from 0 (one expert) to ln e (even).
    """
    tokens = jnp.maximum(totals["tokens"], 1)
    choices = totals["choices"].sum()
    importance = totals["gates"] / tokens
    dropped, unprocessed = dropped_and_unprocessed([totals])
    return {
        "load": jnp.where(choices > 0, totals["choices"] / jnp.maximum(choices, 1), importance),
        "importance": importance,
        "dropped": dropped,
        "unprocessed": unprocessed,
        "gate_entropy": totals["entropy"] / tokens,
    }
