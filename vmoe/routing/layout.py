"""Slots of fixed capacity: rows to the experts and back.

``choices`` (who fills a slot) and ``slots`` (where a choice went) are each other's inverse, so
dispatch and combine are gathers, and with the backward passes written out those are gathers too:
nothing is scattered, and no one-hot array of tokens x experts x slots exists.
"""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from vmoe.axes import Routing, SoftRouting


def dispatch(
    tokens: Float[Array, "g s d"], routing: Routing | SoftRouting
) -> Float[Array, "g e c d"]:
    """The tokens at their slots; empty slots hold zeros."""
    if isinstance(routing, SoftRouting):
        slots = jnp.einsum(
            "gsd,gsec->gecd", tokens, routing.dispatch, preferred_element_type=jnp.float32
        )
        return slots.astype(tokens.dtype)
    return _dispatch(tokens, routing.slots, routing.choices)


def combine(
    outputs: Float[Array, "g e c d"], routing: Routing | SoftRouting
) -> Float[Array, "g s d"]:
    """Each token's weighted sum of what its experts gave; zeros where all was dropped.

    Weights and sums are float32 whatever the dtype of the outputs, and so is the result.
    """
    if isinstance(routing, SoftRouting):
        return jnp.einsum(
            "gecd,gsec->gsd", outputs, routing.combine, preferred_element_type=jnp.float32
        )
    return _combine(outputs, routing.weights, routing.slots, routing.choices)


def _rows(rows: Float[Array, "g r d"], index: Int[Array, "g *i"]) -> Float[Array, "g *i d"]:
    """Rows of each group by index; zeros where the index is past the end."""
    return jax.vmap(lambda r, i: r.at[i].get(mode="fill", fill_value=0))(rows, index)


def _flat(slots: Float[Array, "g e c d"]) -> Float[Array, "g ec d"]:
    g, e, c, d = slots.shape
    return slots.reshape(g, e * c, d)


@jax.custom_vjp
def _dispatch(
    tokens: Float[Array, "g s d"], slots: Int[Array, "g s k"], choices: Int[Array, "g e c"]
) -> Float[Array, "g e c d"]:
    return _rows(tokens, choices // slots.shape[-1])


def _dispatch_forward(tokens, slots, choices):
    return _dispatch(tokens, slots, choices), slots


def _dispatch_backward(slots, gradient):
    copies = _rows(_flat(gradient), slots)
    return copies.sum(axis=2, dtype=jnp.float32).astype(gradient.dtype), None, None


_dispatch.defvjp(_dispatch_forward, _dispatch_backward)


@jax.custom_vjp
def _combine(
    outputs: Float[Array, "g e c d"],
    weights: Float[Array, "g s k"],
    slots: Int[Array, "g s k"],
    choices: Int[Array, "g e c"],
) -> Float[Array, "g s d"]:
    return (_rows(_flat(outputs), slots) * weights[..., None]).sum(axis=2)


def _combine_forward(outputs, weights, slots, choices):
    return _combine(outputs, weights, slots, choices), (outputs, weights, slots, choices)


def _combine_backward(saved, gradient):
    outputs, weights, slots, choices = saved
    g, s, k = slots.shape
    weight_of_slot = _rows(weights.reshape(g, s * k, 1), choices)
    to_outputs = _rows(gradient, choices // k) * weight_of_slot
    to_weights = (_rows(_flat(outputs), slots) * gradient[:, :, None]).sum(axis=-1)
    return to_outputs.astype(outputs.dtype), to_weights, None, None


_combine.defvjp(_combine_forward, _combine_backward)
