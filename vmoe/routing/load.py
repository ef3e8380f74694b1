"""Expert use in an MoE layer: sums over the tokens of a record, and the measures that follow.

``expert_totals`` sums over a record on the device. The sums of batches are added up, and
``block_measures`` makes means of them.
"""

import dataclasses
import math
from collections.abc import Iterable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int, Shaped

from vmoe.axes import Decision, Record, Routing
from vmoe.routing.groups import by_image

Scalar = Float[Array, ""] | float


def choices(record: Record | Decision) -> Int[Array, "e"]:
    """The number of choices of each expert, before any is dropped; zeros with soft routing."""
    e = record.gates.shape[-1]
    if not isinstance(record.routing, Routing):
        return jnp.zeros(e, jnp.int32)
    return jnp.zeros(e + 1).at[record.routing.experts].add(1)[:e].astype(jnp.int32)


def group_sums(decision: Decision, valid: Bool[Array, "g s"]) -> dict[str, Shaped[Array, "g ..."]]:
    """What a router is given besides its own sums, of each group: "choices" and "tokens"."""
    return {"choices": jax.vmap(choices)(decision), "tokens": valid.sum(1)}


@dataclasses.dataclass
class ExpertTotals:
    """Sums over the tokens of one sparse block. Soft routing makes no choices.

    Attributes:
        tokens: number of tokens.
        gates: sum of each expert's gates.
        entropy: sum of the entropies of the tokens' gates, in nats.
        choices: number of choices of each expert, before any is dropped.
        kept: number of choices of each expert that got a slot.
        unprocessed: number of tokens without a slot at any routed expert.
    """

    tokens: int
    gates: Float[np.ndarray, "e"]
    entropy: float
    choices: Int[np.ndarray, "e"]
    kept: Int[np.ndarray, "e"]
    unprocessed: int

    @property
    def load(self) -> Float[np.ndarray, "e"]:
        """Each expert's fraction of all choices; see ``block_measures``."""
        return block_measures(vars(self))["load"]

    @property
    def importance(self) -> Float[np.ndarray, "e"]:
        """Mean gate of each expert."""
        return block_measures(vars(self))["importance"]

    @property
    def dropped(self) -> float:
        """Fraction of the choices that got no slot.

        It is 1 - kept / choices, as in earlier reports. ``block_measures`` has
        (choices - kept) / choices, which may differ in the last bit.
        """
        return 1 - self.kept.sum() / max(1, self.choices.sum()) if self.choices.sum() else 0.0

    @property
    def gate_entropy(self) -> float:
        """Mean entropy of the gates, in nats: from 0 (one expert) to ln e (uniform)."""
        return block_measures(vars(self))["gate_entropy"] + 0.0  # gates of 0 and 1 give -0.0

    @property
    def relative_entropy(self) -> float:
        """The gate entropy as a fraction of ln e; 1 for a single expert."""
        e = len(self.gates)
        return self.gate_entropy / math.log(e) if e > 1 else 1.0


def expert_totals(record: Record) -> dict[str, Any]:
    """The fields of ``ExpertTotals`` of one sparse block, over all real tokens.

    Also the ``sums`` of the router, by name.
    """
    real, gates = record.valid[..., None], record.gates
    e = gates.shape[-1]
    kept = jnp.zeros(e, jnp.int32)
    unprocessed = jnp.int32(0)
    if isinstance(record.routing, Routing):
        routing = record.routing
        kept = routing.filled.sum((0, 2))
        unprocessed = (record.valid & ~routing.kept.any(-1)).sum()
    return {
        "tokens": record.valid.sum(),
        "gates": jnp.where(real, gates, 0.0).sum((0, 1)),
        "entropy": jnp.where(real, jax.scipy.special.entr(gates), 0.0).sum(),
        "choices": choices(record),
        "kept": kept,
        "unprocessed": unprocessed,
        "sums": {name: x.sum(0) for name, x in record.sums.items()},
    }


def totals_of(totals: Mapping[str, Any]) -> ExpertTotals:
    """``expert_totals``, summed over batches on the host."""
    arrays = {field.name: totals[field.name] for field in dataclasses.fields(ExpertTotals)}
    return ExpertTotals(**{name: x if x.ndim else x.item() for name, x in arrays.items()})


def dropped_and_unprocessed(blocks: Iterable[Mapping[str, Any]]) -> tuple[Scalar, Scalar]:
    """Fraction of the choices that got no slot, and of the tokens without a routed expert.

    Such tokens keep the value that the residual connection carries, plus the outputs of shared
    experts, if there are any. Tokens with a slot at a zero expert do not count, although they keep
    their value too. Expert choice and soft routing drop nothing; soft routing makes no choices and
    processes all tokens.

    Args:
        blocks: the fields of the ``ExpertTotals`` of each block; fractions are over all blocks.
    """
    blocks = list(blocks)
    choices, kept = (sum(block[name].sum() for block in blocks) for name in ("choices", "kept"))
    tokens, unprocessed = (
        sum(block[name] for block in blocks) for name in ("tokens", "unprocessed")
    )
    xp = _namespace(blocks[0]) if blocks else np
    return (choices - kept) / xp.maximum(choices, 1), unprocessed / xp.maximum(tokens, 1)


def block_measures(totals: Mapping[str, Any]) -> dict[str, Any]:
    """How evenly one sparse block used its experts, over all real tokens; NumPy or JAX arrays.

    Args:
        totals: the ``expert_totals`` of the block, or the fields of its ``ExpertTotals``.

    Returns:
        these measures by name.

        - load: fraction of the choices per expert, before any is dropped; sums to 1. Equal to
          importance for soft routing, which makes no choices.
        - importance: mean gate of each expert; sums to 1.
        - dropped, unprocessed: see ``dropped_and_unprocessed``.
        - gate_entropy: mean entropy of a token's gates, in nats; from 0 (one expert) to ln e
          (uniform).
    """
    xp = _namespace(totals)
    tokens = xp.maximum(totals["tokens"], 1)
    choices = totals["choices"].sum()
    importance = totals["gates"] / tokens
    dropped, unprocessed = dropped_and_unprocessed([totals])
    return {
        "load": xp.where(choices > 0, totals["choices"] / xp.maximum(choices, 1), importance),
        "importance": importance,
        "dropped": dropped,
        "unprocessed": unprocessed,
        "gate_entropy": totals["entropy"] / tokens,
    }


def _namespace(totals: Mapping[str, Any]) -> Any:
    """``numpy`` or ``jax.numpy``."""
    return totals["gates"].__array_namespace__()


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
    per_image = by_image(use, b, devices).sum(axis=1)
    return per_image / jnp.maximum(per_image.sum(-1, keepdims=True), 1e-9)


def processing_experts(routing: Routing) -> Bool[Array, "g s e"]:
    """Which experts process each token."""
    e = routing.choices.shape[1]
    one_hot = routing.experts[..., None] == jnp.arange(e)
    return (one_hot & routing.kept[..., None]).any(axis=2)
