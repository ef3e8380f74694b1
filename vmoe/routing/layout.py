"""Dispatch and combine with slots of fixed capacity.

``choices`` (which choice fills a slot) and ``slots`` (which slot a choice got) are inverses of each
other, so dispatch, combine and their custom backward passes are gathers. No one-hot array of
tokens x experts x slots is built. If fewer than half of the choices can have a slot, as with
expert choice or a capacity factor below 0.5, a scatter-add sums the rows of a token.
"""

import functools
import math

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int, Shaped

from vmoe.axes import Routing, SoftRouting
from vmoe.errors import UsageError
from vmoe.reverse_mode import reverse_only
from vmoe.routing.indexing import divide, rows_at
from vmoe.routing.queues import invert


@jax.named_scope("dispatch")
@functools.partial(jax.jit, static_argnames="mixture_dtype", inline=True)
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
@functools.partial(jax.jit, inline=True)
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


@functools.partial(jax.jit, inline=True)
def fill_empty(routing: Routing, valid: Bool[Array, "g s"]) -> Routing:
    """The routing with a choice in every slot, for experts that are any modules.

    A module may not be finite at zero, and it may have statistics over its rows. So the empty slots
    of an expert repeat its choices in turn. An expert without any gets the first token of the group
    that is not padding. Nothing reads the outputs of these slots: ``combine`` takes the original.
    """
    _, s, k = routing.slots.shape
    own = jnp.take_along_axis(routing.choices, in_turn(routing.filled), axis=-1)
    first = valid.argmax(1)[:, None, None] * k
    return routing._replace(choices=jnp.where(own < s * k, own, first))


def fill_padding(
    x: Shaped[Array, "b n *x"], mask: Bool[Array, "b n"], shares: int
) -> Shaped[Array, "b n *x"]:
    """Tokens, or inputs of tokens, with those that are no padding, in turn, in place of padding.

    As ``fill_empty``, for modules that get all tokens. If there are none, numbers from 1 to 2 are
    used, since a module may not be finite at a row of equal numbers either.

    Args:
        shares: number of equal parts of the batch that are filled apart, such as that of devices.
    """
    real, rest = mask.reshape(shares, -1), x.shape[2:]
    rows = rows_at(x.reshape(*real.shape, *rest), in_turn(real))
    if jnp.issubdtype(x.dtype, jnp.inexact):
        size = math.prod(rest)
        other = (1 + jnp.arange(size) / max(1, size)).reshape(rest).astype(x.dtype)
        rows = jnp.where(real.any(1).reshape(-1, *[1] * (x.ndim - 1)), rows, other)
    return rows.reshape(x.shape)


def in_turn(real: Bool[Array, "*b x"]) -> Int[Array, "*b x"]:
    """For each place itself if it is real, else one of the real places, each of them in turn.

    Place 0 if none is real.
    """
    x = real.shape[-1]
    places, rank = jnp.arange(x), jnp.cumsum(real, axis=-1)
    flat = jnp.where(real, rank - 1, x).reshape(math.prod(real.shape[:-1]), x)
    order = (invert(flat, x) % max(1, x)).reshape(real.shape)  # the real ones first
    turn = (places - rank) % jnp.maximum(rank[..., -1:], 1)
    return jnp.where(real, places, jnp.take_along_axis(order, turn, axis=-1))


def dispatch_rows(
    rows: Shaped[Array, "g s *x"], routing: Routing | SoftRouting
) -> Shaped[Array, "g e c *x"]:
    """As ``dispatch``, for rows of any shape and dtype, and with several slots for one choice."""
    if isinstance(routing, Routing):
        return rows_at(rows, routing.tokens)
    if not jnp.issubdtype(rows.dtype, jnp.floating):
        raise UsageError(
            f"soft slots hold mixtures of tokens, and {rows.dtype} cannot be mixed: give floats"
        )
    g, s, *rest = rows.shape
    slots = dispatch(rows.reshape(g, s, -1), routing)
    return slots.reshape(*slots.shape[:3], *rest)


def _few_slots(slots: Int[Array, "g s k"], choices: Int[Array, "g e c"]) -> bool:
    """Whether fewer than half of the choices can have a slot, as with expert choice (k = e).

    Gathers by rank would then read mostly empty rows; a scatter-add reads each slot once.
    """
    return slots.size > 2 * choices.size


@jax.custom_vjp
def _dispatch(
    tokens: Float[Array, "g s d"], slots: Int[Array, "g s k"], choices: Int[Array, "g e c"]
) -> Float[Array, "g e c d"]:
    return rows_at(tokens, divide(choices, slots.shape[-1])[0])  # choice // k is its token


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
    grad_slots = rows_at(gradient, divide(choices, k)[0])  # g e c d
    grad_outputs = grad_slots * rows_at(weights.reshape(g, s * k, 1), choices)  # g e c d
    if _few_slots(slots, choices):
        grad_by_slot = (outputs * grad_slots).sum(axis=-1).reshape(g, -1, 1)  # g ec 1
        grad_weights = rows_at(grad_by_slot, slots)[..., 0]  # g s k
    else:
        rows = outputs.reshape(g, -1, outputs.shape[-1])  # g ec d
        products = [(rows_at(rows, slots[..., i]) * gradient).sum(-1) for i in range(k)]
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
    rows = outputs.reshape(g, -1, outputs.shape[-1])  # g ec d
    if _few_slots(slots, choices):
        flat = choices.reshape(g, -1)  # g ec
        if weights is not None:
            rows = rows * rows_at(weights.reshape(g, s * k, 1), flat)
        zeros = jnp.zeros((g, s, rows.shape[-1]), jnp.result_type(rows, jnp.float32))
        tokens = divide(flat, k)[0]
        return jax.vmap(lambda z, i, r: z.at[i].add(r, mode="drop"))(zeros, tokens, rows)
    # One gather per rank: a single gather of all ranks is ten times as slow on a CPU.
    dtype = jnp.result_type(rows, jnp.float32)
    terms = (rows_at(rows, slots[..., i]).astype(dtype) for i in range(k))
    if weights is not None:
        terms = (term * weights[..., i, None] for i, term in enumerate(terms))
    return functools.reduce(jnp.add, terms)
