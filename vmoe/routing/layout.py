"""Dispatch and combine with slots of fixed capacity.

``choices`` (which choice fills a slot) and ``slots`` (which slot a choice got) are inverses of each
other, so dispatch, combine and their custom backward passes are gathers. No one-hot array of
tokens x experts x slots is built. If fewer than half of the choices can have a slot, as with
expert choice or a capacity factor below 0.5, a scatter-add sums the rows of a token.
"""

import functools

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int, Shaped

from vmoe.axes import Routing, SoftRouting
from vmoe.errors import UsageError
from vmoe.reverse_mode import reverse_only


@jax.named_scope("dispatch")
def dispatch(
    tokens: Float[Array, "g s d"],
    routing: Routing | SoftRouting,
    *,
    mixture_dtype: jax.typing.DTypeLike | None = None,
) -> Float[Array, "g e c d"]:
    """The token in each slot, zeros in empty slots; a mixture of all tokens in each soft slot.

    Args:
        mixture_dtype: dtype of the mixtures, summed in float32 at least; the tokens' if None.
    """
    if isinstance(routing, SoftRouting):
        dtype = jnp.result_type(tokens, routing.dispatch, jnp.float32)
        slots = jnp.einsum("gsd,gsec->gecd", tokens, routing.dispatch, preferred_element_type=dtype)
        return slots.astype(mixture_dtype or tokens.dtype)
    return _dispatch(reverse_only(tokens), routing.slots, routing.choices)


@jax.named_scope("combine")
def combine(
    outputs: Float[Array, "g e c d"], routing: Routing | SoftRouting
) -> Float[Array, "g s d"]:
    """Each token's weighted sum of its experts' outputs; zeros if all its choices were dropped.

    Weights, sums and result are float32 for any dtype of the outputs but float64.
    """
    if isinstance(routing, SoftRouting):
        dtype = jnp.result_type(outputs, routing.combine, jnp.float32)
        return jnp.einsum("gecd,gsec->gsd", outputs, routing.combine, preferred_element_type=dtype)
    outputs, weights = reverse_only((outputs, routing.weights))
    return _combine(outputs, weights, routing.slots, routing.choices)


def scaled(routing: Routing | SoftRouting, factor: float) -> Routing | SoftRouting:
    """The routing with its combine weights multiplied by a factor."""
    if factor == 1:
        return routing
    if isinstance(routing, SoftRouting):
        return routing._replace(combine=routing.combine * factor)
    return routing._replace(weights=routing.weights * factor)


def fill_empty(
    slots: Float[Array, "g e c d"],
    tokens: Float[Array, "g s d"],
    routing: Routing,
    valid: Bool[Array, "g s"],
) -> Float[Array, "g e c d"]:
    """The slots with a token in those that are empty: a module may not be finite at zero.

    Nothing reads the outputs of empty slots. They get the first token of the group that is not
    padding; ones if there is none.
    """
    first = jnp.take_along_axis(tokens, valid.argmax(1)[:, None, None], axis=1)  # g 1 d
    row = jax.lax.stop_gradient(jnp.where(valid.any(1)[:, None, None], first, 1))
    filled = routing.tokens < tokens.shape[1]
    return jnp.where(filled[..., None], slots, row[:, None])


def dispatch_inputs(
    inputs: Shaped[Array, "g s x"], routing: Routing | SoftRouting, valid: Bool[Array, "g s"]
) -> Shaped[Array, "g e c x"]:
    """Further inputs of experts, by slot: as ``dispatch``, for arrays of any dtype.

    Empty slots have the inputs of the token that ``fill_empty`` puts there.
    """
    if isinstance(routing, Routing):
        filled = routing.tokens < inputs.shape[1]
        return rows_at(inputs, jnp.where(filled, routing.tokens, valid.argmax(1)[:, None, None]))
    if not jnp.issubdtype(inputs.dtype, jnp.floating):
        raise UsageError(
            f"soft slots hold mixtures of tokens, and {inputs.dtype} cannot be mixed: give floats"
        )
    return dispatch(inputs, routing)


def rows_at(rows: Shaped[Array, "g r d"], index: Int[Array, "g *i"]) -> Shaped[Array, "g *i d"]:
    """Rows of each group by index; zeros for an index past the end."""
    return jax.vmap(lambda r, i: r.at[i].get(mode="fill", fill_value=0))(rows, index)


def _flat(slots: Float[Array, "g e c d"]) -> Float[Array, "g ec d"]:
    g, e, c, d = slots.shape
    return slots.reshape(g, e * c, d)


def _few_slots(slots: Int[Array, "g s k"], choices: Int[Array, "g e c"]) -> bool:
    """Whether fewer than half of the choices can have a slot, as with expert choice (k = e).

    Gathers by rank would then read mostly empty rows; a scatter-add reads each slot once.
    """
    return slots.size > 2 * choices.size


@jax.custom_vjp
def _dispatch(
    tokens: Float[Array, "g s d"], slots: Int[Array, "g s k"], choices: Int[Array, "g e c"]
) -> Float[Array, "g e c d"]:
    return rows_at(tokens, choices // slots.shape[-1])  # choice // k is its token


def _dispatch_forward(tokens, slots, choices):
    return _dispatch(tokens, slots, choices), (slots, choices)


def _dispatch_backward(saved, gradient):
    slots, choices = saved
    grad_tokens = _add_up(gradient, None, slots, choices)
    return grad_tokens.astype(gradient.dtype), None, None


_dispatch.defvjp(_dispatch_forward, _dispatch_backward)


@jax.custom_vjp
def _combine(
    outputs: Float[Array, "g e c d"],
    weights: Float[Array, "g s k"],
    slots: Int[Array, "g s k"],
    choices: Int[Array, "g e c"],
) -> Float[Array, "g s d"]:
    return _add_up(outputs, weights, slots, choices)


def _combine_forward(outputs, weights, slots, choices):
    return _combine(outputs, weights, slots, choices), (outputs, weights, slots, choices)


def _combine_backward(saved, gradient):
    outputs, weights, slots, choices = saved
    g, s, k = slots.shape
    grad_slots = rows_at(gradient, choices // k)  # g e c d
    grad_outputs = grad_slots * rows_at(weights.reshape(g, s * k, 1), choices)  # g e c d
    if _few_slots(slots, choices):
        grad_by_slot = (outputs * grad_slots).sum(axis=-1).reshape(g, -1, 1)  # g ec 1
        grad_weights = rows_at(grad_by_slot, slots)[..., 0]  # g s k
    else:
        products = [(rows_at(_flat(outputs), slots[..., i]) * gradient).sum(-1) for i in range(k)]
        grad_weights = jnp.stack(products, axis=-1)  # g s k
    return grad_outputs.astype(outputs.dtype), grad_weights.astype(weights.dtype), None, None


_combine.defvjp(_combine_forward, _combine_backward)


def _add_up(
    outputs: Float[Array, "g e c d"],
    weights: Float[Array, "g s k"] | None,
    slots: Int[Array, "g s k"],
    choices: Int[Array, "g e c"],
) -> Float[Array, "g s d"]:
    """Each token's sum of the rows of its slots, weighted if weights are given.

    In float32 at least.
    """
    g, s, k = slots.shape
    rows = _flat(outputs)  # g ec d
    if _few_slots(slots, choices):
        flat = choices.reshape(g, -1)  # g ec
        if weights is not None:
            rows = rows * rows_at(weights.reshape(g, s * k, 1), flat)
        zeros = jnp.zeros((g, s, rows.shape[-1]), jnp.result_type(rows, jnp.float32))
        return jax.vmap(lambda z, i, r: z.at[i].add(r, mode="drop"))(zeros, flat // k, rows)
    # One gather per rank: a single gather of all ranks is ten times as slow on a CPU.
    dtype = jnp.result_type(rows, jnp.float32)
    terms = (rows_at(rows, slots[..., i]).astype(dtype) for i in range(k))
    if weights is not None:
        terms = (term * weights[..., i, None] for i, term in enumerate(terms))
    return functools.reduce(jnp.add, terms)
