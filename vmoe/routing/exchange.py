"""Rows of experts without a fixed capacity, exchanged between the devices that share the experts.

A device sends each kept choice of its tokens to the device of its expert. To a sender, receivers
are experts with a capacity, and to a receiver, senders are groups of tokens with one choice each,
so ``queue``, ``dispatch``, ``combine`` and ``sort_rows`` do all of the work on both sides.

All functions are of one device, inside a ``jax.shard_map``.
"""

import functools
import math
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from vmoe.axes import Routing
from vmoe.reverse_mode import reverse_only
from vmoe.routing.indexing import rows_at
from vmoe.routing.queues import invert, queue
from vmoe.routing.rows import sort_rows


def buffer_rows(routing: Routing, receivers: int, k: int, factor: float | None) -> int:
    """The number of rows of a buffer: ``factor`` even shares, at most all that can be sent.

    Args:
        receivers: number of devices over which the experts are split.
        k: experts per token.
        factor: None for all rows that one device can send to another.
    """
    g, s, ranks = routing.slots.shape
    _, e, c = routing.choices.shape
    most = min(g * s * ranks, g * e // receivers * c)
    return most if factor is None else min(most, math.ceil(factor * g * s * k / receivers))


def to_receivers(routing: Routing, receivers: int, c: int) -> Routing:
    """The routing of a device's tokens, as one group, to the devices of their experts.

    Kept choices queue there. Those with the smallest weights are the last in their queue, and are
    dropped first.

    Args:
        routing: of this device's groups.
        receivers: number of devices over which the experts are split, this one among them.
        c: number of rows for each of them.
    """
    experts_each = routing.choices.shape[1] // receivers
    shape = 1, -1, routing.slots.shape[-1]
    to = jnp.where(routing.kept, routing.experts // experts_each, receivers)
    order = jnp.argsort(routing.weights.reshape(1, -1), descending=True)
    slots, choices = queue(to.reshape(1, -1, 1), order, e=receivers, c=c)
    slots, weights = slots.reshape(shape), routing.weights.reshape(shape)
    weights = jnp.where(slots < receivers * c, weights, 0)
    return Routing(to.reshape(shape), slots, choices, weights)


def exchange(routing: Routing, receivers: int, c: int) -> tuple[Routing, Int[Array, "x c"]]:
    """How the rows of a device travel in buffers of c rows for each receiver; see ``to_receivers``.

    Returns:
        the routing to the receivers, and the expert of each row among those of its receiver; their
        number if there is none.
    """
    plan, experts_each = to_receivers(routing, receivers, c), routing.choices.shape[1] // receivers
    experts = rows_at(routing.experts.reshape(1, -1) % experts_each, plan.choices)
    return plan, jnp.where(plan.choices < routing.slots.size, experts, experts_each)[0]


class RaggedAllToAll(NamedTuple):
    """Sends each device its rows alone, which it receives in one buffer, without gaps.

    Attributes:
        axis: of the mesh, with the devices that send each other rows.
        of_experts: numbers of rows, by sender and expert.
        sent: number of rows of the array that is sent, which are sorted by expert.
        room: number of rows of the array that is received.
    """

    axis: str
    of_experts: Int[Array, "x e"]
    sent: int
    room: int

    def there(self, rows: Float[Array, "r d"]) -> Float[Array, "x d"]:
        """The rows that this device receives, by sender and expert, then zeros."""
        return _send(reverse_only(rows), self._sizes, self.axis, self.sent, self.room)

    def back(self, rows: Float[Array, "x d"]) -> Float[Array, "r d"]:
        """What became of the rows that this device sent."""
        return _send(reverse_only(rows), self._sizes.T, self.axis, self.room, self.sent)

    @property
    def experts(self) -> Int[Array, "x"]:
        """The expert of each received row among those of this device; their number if none."""
        senders = len(self.of_experts)
        sizes = self.of_experts.reshape(senders, senders, -1)[:, jax.lax.axis_index(self.axis)]
        e = sizes.shape[1]
        experts = jnp.append(jnp.tile(jnp.arange(e), senders), e)
        times = jnp.append(sizes, self.room - sizes.sum())
        return jnp.repeat(experts, times, total_repeat_length=self.room)

    @property
    def _sizes(self) -> Int[Array, "x x"]:
        """Numbers of rows, by sender and receiver."""
        senders = len(self.of_experts)
        return self.of_experts.reshape(senders, senders, -1).sum(-1)


@functools.partial(jax.custom_vjp, nondiff_argnums=(2, 3, 4))
def _send(
    rows: Float[Array, "r d"], sizes: Int[Array, "x x"], axis: str, sent: int, room: int
) -> Float[Array, "_ d"]:
    """The rows that this device receives, of ``room``, for its own, of which ``sent`` has place.

    Args:
        sizes: numbers of rows by sender and receiver.
    """
    device = jax.lax.axis_index(axis)
    starts = sizes.cumsum(1) - sizes  # of the rows to each receiver, at their sender
    places = sizes.cumsum(0) - sizes  # of the rows of each sender, at their receiver
    into = jnp.zeros((room, *rows.shape[1:]), rows.dtype)
    offsets_and_sizes = starts[device], sizes[device], places[device], sizes[:, device]
    return jax.lax.ragged_all_to_all(rows, into, *offsets_and_sizes, axis_name=axis)


def _send_forward(rows, sizes, axis, sent, room):
    return _send(rows, sizes, axis, sent, room), sizes


def _send_backward(axis, sent, room, sizes, gradient):
    # JAX's own rule would ask the others again where the rows lie.
    return _send(gradient, sizes.T, axis, room, sent), None


_send.defvjp(_send_forward, _send_backward)


def without_gaps(routing: Routing, room: int, axis: str) -> tuple[Routing, RaggedAllToAll]:
    """The rows of a device sorted by expert, and how they are sent; see ``sort_rows``."""
    rows, sizes = sort_rows(routing, block=1)
    of_experts = jax.lax.all_gather(sizes, axis)
    return rows, RaggedAllToAll(axis, of_experts, rows.choices.size, room)


def within(routing: Routing, receivers: int, room: int, axis: str) -> Routing:
    """The routing without what the devices of the experts have no room for.

    If more rows than ``room`` are sent to a device, all senders drop the same share, those with the
    smallest weights.
    """
    c = routing.slots.size
    plan = to_receivers(routing, receivers, c)
    sizes = jax.lax.all_gather((plan.choices[0] < c).sum(1), axis)  # x x
    total = jnp.maximum(sizes.sum(0), 1)
    ends = jnp.minimum(jnp.round(sizes.cumsum(0) * (room / total)), room).astype(sizes.dtype)
    share = jnp.minimum(jnp.diff(ends, axis=0, prepend=0), sizes)
    most = jnp.where(total > room, share, sizes)[jax.lax.axis_index(axis)]
    fits = plan.kept & (plan.slots % c < most.at[plan.experts].get(mode="clip"))
    return without_overflow(routing, fits.reshape(routing.slots.shape))


def received(experts: Int[Array, "x c"], e: int) -> Routing:
    """The routing of received rows: each sender's are a group, and each row has one choice.

    Args:
        experts: the expert of each row among the e of this device; e if there is no row.
    """
    order = jnp.broadcast_to(jnp.arange(experts.shape[1]), experts.shape)
    slots, choices = queue(experts[..., None], order, e=e, c=experts.shape[1])
    weights = (experts[..., None] < e).astype(jnp.float32)
    return Routing(experts[..., None], slots, choices, weights)


def without_overflow(routing: Routing, fits: Bool[Array, "g s k"]) -> Routing:
    """The routing without the choices that found no place in a buffer, which are dropped."""
    g = len(routing.slots)
    _, e, c = routing.choices.shape
    filled = rows_at(fits.reshape(g, -1), routing.choices)  # g e c
    places = filled.cumsum(-1) - 1 + c * jnp.arange(e)[:, None]
    slots = jnp.where(fits, rows_at(places.reshape(g, -1), routing.slots), e * c)
    choices = invert(slots.reshape(g, -1), e * c).reshape(g, e, c)
    return Routing(routing.experts, slots, choices, jnp.where(fits, routing.weights, 0))


def hottest(routing: Routing, hot: int, axes: tuple[str, ...]) -> Int[Array, "x"]:
    """The experts with the most kept choices of all devices along some axes of the mesh.

    Args:
        hot: how many.
    """
    load = routing.filled.sum((0, 2), dtype=jnp.int32)
    return jax.lax.top_k(jax.lax.psum(load, axes), hot)[1]


def split_off(routing: Routing, experts: Int[Array, "x"]) -> tuple[Routing, Routing]:
    """The routing to some experts, numbered in their order, and that to the others."""
    _, e, c = routing.choices.shape
    hot = len(experts)
    numbers = jnp.full(e + 1, hot).at[experts].set(jnp.arange(hot))[routing.experts]  # g s k
    chosen = numbers < hot
    slots = jnp.where(chosen & routing.kept, numbers * c + routing.slots % c, hot * c)
    weights = jnp.where(chosen, routing.weights, 0), jnp.where(chosen, 0, routing.weights)
    some = Routing(numbers, slots, routing.choices[:, experts], weights[0])
    none = routing.choices.at[:, experts].set(routing.slots[0].size)
    others = jnp.where(chosen, e, routing.experts), jnp.where(chosen, e * c, routing.slots)
    return some, Routing(*others, none, weights[1])


def copies(
    params: Float[Array, "e ..."], experts: Int[Array, "x"], axis: str
) -> Float[Array, "x ..."]:
    """Parameters of some experts, from the devices along an axis of the mesh that have them.

    The gradient of a copy is summed over these devices.

    Args:
        params: those of the experts of this device.
    """
    e = len(params)
    places = experts - jax.lax.axis_index(axis) * e
    places = jnp.where(places < 0, e, places)  # a negative index would count from the end
    return jax.lax.psum(params.at[places].get(mode="fill", fill_value=0), axis)
