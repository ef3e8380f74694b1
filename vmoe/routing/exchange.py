"""Rows of experts without a fixed capacity, exchanged between devices.

A device sends each kept choice of its tokens to the device of its expert. A buffer of fixed size
for each pair of sender and receiver makes this one dense all-to-all. To a sender, receivers are
experts with a capacity, and to a receiver, senders are groups of tokens with one choice each, so
``queue``, ``dispatch``, ``combine`` and ``sort_rows`` do all of the work on both sides.
"""

import math
from typing import NamedTuple

import jax.numpy as jnp
from jaxtyping import Array, Int

from vmoe.axes import Routing
from vmoe.errors import UsageError
from vmoe.routing.layout import rows_at
from vmoe.routing.queues import invert, queue


def buffer_rows(
    routing: Routing, devices: int, receivers: int, k: int, factor: float | None
) -> int:
    """The number of rows of a buffer: ``factor`` even shares, at most all that can be sent.

    Args:
        devices: number of equal parts of the groups.
        receivers: number of devices over which the experts are split.
        k: experts per token.
        factor: None for all rows that one device can send to another.
    """
    g, s, ranks = routing.slots.shape
    _, e, c = routing.choices.shape
    tokens = g // devices * s
    most = min(tokens * ranks, g // devices * e // receivers * c)
    if factor is None or receivers == 1:  # a device's own rows need no buffer
        return most
    return min(most, math.ceil(factor * tokens * k / receivers))


class Exchange(NamedTuple):
    """How the rows of some devices travel.

    Attributes:
        routing: each device's tokens are a group, and the x receivers, itself among them, its
            experts.
        experts: the expert of each row among those of its receiver; their number if there is none.
    """

    routing: Routing
    experts: Int[Array, "g x c"]


def send(routing: Routing, receivers: int, c: int) -> Exchange:
    """Queues the kept choices of a device's tokens for the devices of their experts.

    Those with the smallest weights are the last in their queue, and are dropped first.

    Args:
        routing: of this device's groups.
        receivers: number x of devices over which the experts are split.
        c: number of rows for each of them.

    Returns:
        the exchange of one device.

    Raises:
        UsageError: the device has too many choices to be sorted.
    """
    g, s, k = routing.slots.shape
    e = routing.choices.shape[1]
    if (receivers + 1) * g * s * k >= 2**31:
        raise UsageError(f"{g * s:,} tokens x k={k} on a device are too many: give smaller batches")
    experts = jnp.where(routing.kept, routing.experts, e).reshape(1, -1, 1)
    own = e // receivers
    order = jnp.argsort(routing.weights.reshape(1, -1), descending=True)
    slots, choices = queue(experts // own, order, e=receivers, c=c)
    of_rows = rows_at(experts[..., 0] % own, choices)
    of_rows = jnp.where(choices < g * s * k, of_rows, own)
    shape = 1, g * s, k
    to, slots, weights = (experts // own).reshape(shape), slots.reshape(shape), routing.weights
    weights = jnp.where(slots < receivers * c, weights.reshape(shape), 0)
    return Exchange(Routing(to, slots, choices, weights), of_rows)


def received(experts: Int[Array, "x c"], e: int) -> Routing:
    """The routing of received rows: each sender's are a group, and each row has one choice.

    Args:
        experts: the expert of each row among the e of this device; e if there is no row.
    """
    order = jnp.broadcast_to(jnp.arange(experts.shape[1]), experts.shape)
    slots, choices = queue(experts[..., None], order, e=e, c=experts.shape[1])
    weights = (experts[..., None] < e).astype(jnp.float32)
    return Routing(experts[..., None], slots, choices, weights)


def without_overflow(routing: Routing, exchange: Exchange) -> Routing:
    """The routing without the choices that found no place in a buffer, which are dropped."""
    g, s, k = routing.slots.shape
    _, e, c = routing.choices.shape
    fits = exchange.routing.kept.reshape(g, s, k)
    filled = rows_at(fits.reshape(g, -1), routing.choices)  # g e c
    places = filled.cumsum(-1) - 1 + c * jnp.arange(e)[:, None]
    slots = jnp.where(fits, rows_at(places.reshape(g, -1), routing.slots), e * c)
    choices = invert(slots.reshape(g, -1), e * c).reshape(g, e, c)
    return Routing(routing.experts, slots, choices, jnp.where(fits, routing.weights, 0))
