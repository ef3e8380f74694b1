"""The load of experts."""

import jax.numpy as jnp
from jaxtyping import Array, Int

from vmoe.axes import Record, Routing


def choices(record: Record) -> Int[Array, "e"]:
    """The number of choices of each expert, before any is dropped; zeros with soft routing."""
    e = record.gates.shape[-1]
    if not isinstance(record.routing, Routing):
        return jnp.zeros(e, jnp.int32)
    return jnp.zeros(e + 1).at[record.routing.experts].add(1)[:e].astype(jnp.int32)
