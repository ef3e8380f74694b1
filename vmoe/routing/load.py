"""The load of experts."""

from typing import NamedTuple

import jax.numpy as jnp
from jaxtyping import Array, Int

from vmoe.axes import Record, Routing


class Load(NamedTuple):
    """What the state of a router follows, over a whole batch.

    Attributes:
        choices: the number of choices of each expert; see ``choices``.
        tokens: the number of tokens, without padding.
    """

    choices: Int[Array, "e"]
    tokens: Int[Array, ""]


def load_of(record: Record) -> Load:
    """The load of a layer in a batch."""
    return Load(choices(record), record.valid.sum())


def choices(record: Record) -> Int[Array, "e"]:
    """The number of choices of each expert, before any is dropped; zeros with soft routing."""
    e = record.gates.shape[-1]
    if not isinstance(record.routing, Routing):
        return jnp.zeros(e, jnp.int32)
    return jnp.zeros(e + 1).at[record.routing.experts].add(1)[:e].astype(jnp.int32)
