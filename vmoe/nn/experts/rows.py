"""MLP experts that compute rows sorted by expert, on one device or on several."""

import itertools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Bool, Float

from vmoe.axes import Routing
from vmoe.config.experts import Implementation
from vmoe.config.model import Exchange
from vmoe.nn import keys
from vmoe.nn.experts.mlps import StackedMlps
from vmoe.nn.keys import MaybeKey
from vmoe.routing.exchange import (
    buffer_rows,
    copies,
    exchange,
    hottest,
    received,
    split_off,
    within,
    without_gaps,
    without_overflow,
)
from vmoe.routing.layout import combine, dispatch
from vmoe.routing.rows import block_size, sort_rows
from vmoe.sharding import ALL, EXPERT, Placement


class RowExperts(NamedTuple):
    """How the experts of a layer compute rows.

    Attributes:
        experts: all of them, or those of a device.
        implementation: "blocked" or "ragged".
        placement: the devices of groups and experts.
        exchange: how rows travel.
        dtype: of the computation.
    """

    experts: StackedMlps
    implementation: Implementation
    placement: Placement
    exchange: Exchange
    dtype: jax.typing.DTypeLike

    def __call__(
        self,
        rows: Float[Array, "g s d"],
        routing: Routing,
        key: MaybeKey,
        k: int,
    ) -> tuple[Float[Array, "g s d"], Routing]:
        """The outputs for all tokens, and the routing without what found no place in a buffer.

        Args:
            k: experts per token, a mean where tokens have different numbers of experts.
        """
        placement = self.placement
        if placement.devices == 1:
            return self._of_device(rows, routing, key), routing
        graph, state = nnx.split(self.experts)

        def on_device(rows: Array, routing: Routing, state: Any, key: MaybeKey) -> Any:
            key = None if key is None else jax.random.fold_in(key, jax.lax.axis_index(ALL))
            own = self._replace(experts=nnx.merge(graph, state))
            if placement.expert == 1:  # all experts are here
                return own._of_device(rows, routing, key), routing
            if not self.exchange.hot_experts:
                outputs, fits = own._exchanged(rows, routing, key, k)
            else:
                numbers = hottest(routing, self.exchange.hot_experts, ALL)
                some, others = split_off(routing, numbers)
                copied = jax.tree.map(lambda x: copies(x, numbers, EXPERT), state)
                hot_key, key = keys.split(key, 2)
                outputs, fits = own._exchanged(rows, others, key, k)
                of_hot = self._replace(experts=nnx.merge(graph, copied))
                outputs += of_hot._of_device(rows, some, hot_key)
                fits |= some.kept
            if self.exchange.buffer_factor is not None:
                routing = without_overflow(routing, fits)
            return outputs, routing

        return placement.on_each_expert_device(on_device)(rows, routing, state, key)

    def _exchanged(
        self,
        rows: Float[Array, "g s d"],
        routing: Routing,
        key: MaybeKey,
        k: int,
    ) -> tuple[Float[Array, "g s d"], Bool[Array, "g s k"]]:
        """The outputs of the experts of all devices for a device's tokens, and what was sent."""
        receivers, all_to_all = self.placement.expert, self.placement.all_to_all
        c = buffer_rows(routing, receivers, k, self.exchange.buffer_factor)
        e = routing.choices.shape[1] // receivers
        one_group = in_transit(rows, self.exchange).reshape(1, -1, rows.shape[-1])  # 1 gs d
        expected = routing.slots.size // self.exchange.chunks

        def compute(key: MaybeKey, tokens: Array, numbers: Array) -> Array:
            outputs = self._of_device(tokens, received(numbers, e), key, expected)
            return in_transit(outputs.astype(self.dtype), self.exchange)

        if self.exchange.ragged:
            if self.exchange.buffer_factor is not None:
                routing = within(routing, receivers, receivers * c, EXPERT)
            plan, transport = without_gaps(routing, receivers * c, EXPERT)
            tokens = transport.there(dispatch(one_group, plan)[0, 0])
            outputs = transport.back(compute(key, tokens[None], transport.experts[None])[0])
            return combine(outputs[None, None], plan).reshape(rows.shape), routing.kept

        def there_and_back(key: MaybeKey, *sent: Array) -> Array:
            outputs = compute(key, *(all_to_all(x[0]) for x in sent))
            return all_to_all(outputs)[None]

        plan, numbers = exchange(routing, receivers, c)
        sent = dispatch(one_group, plan), numbers[None]
        outputs = in_chunks(there_and_back, self.exchange.chunks, key, *sent)
        fits = plan.kept.reshape(routing.slots.shape)
        return combine(outputs, plan).reshape(rows.shape), fits

    def _of_device(
        self,
        rows: Float[Array, "g s d"],
        routing: Routing,
        key: MaybeKey,
        choices: int | None = None,
    ) -> Float[Array, "g s d"]:
        """The outputs of the experts of one device for the tokens of some groups.

        Args:
            choices: how many are expected, if fewer than there is room for.
        """
        block = block_size(routing, self.implementation, self.placement.platform, choices)
        routing, sizes = sort_rows(routing, block=block)
        one_group = in_transit(rows, self.exchange).reshape(1, -1, rows.shape[-1])  # 1 gs d
        sorted_rows = dispatch(one_group, routing)[0, 0].astype(self.dtype)  # r d
        outputs = self.experts.on_rows(self.implementation, block, sorted_rows, sizes, key)
        return combine(in_transit(outputs, self.exchange)[None, None], routing).reshape(rows.shape)


def in_transit(rows: Float[Array, "*rows d"], exchange: Exchange) -> Float[Array, "*rows d"]:
    """Rows in the data type in which they travel."""
    return rows.astype(jnp.bfloat16) if exchange.dtype == "bfloat16" else rows


def in_chunks(
    compute: Callable[..., Float[Array, "g e c x"]],
    chunks: int,
    key: MaybeKey,
    *slots: Any,
) -> Float[Array, "g e c x"]:
    """``compute(key, *slots)`` for each of some parts of the slots, joined.

    Args:
        chunks: number of parts; one for each slot of an expert if there are fewer.
        slots: trees of arrays (g, e, c, ...).
    """
    c = jax.tree.leaves(slots)[0].shape[2]
    chunks = min(chunks, c)
    if chunks == 1:
        return compute(key, *slots)

    def part(i: int, j: int) -> Any:
        return jax.tree.map(lambda x: x[:, :, i:j], slots)

    edges = itertools.pairwise(c * i // chunks for i in range(chunks + 1))
    each = zip(keys.split(key, chunks), edges, strict=True)
    return jnp.concatenate([compute(key, *part(i, j)) for key, (i, j) in each], axis=2)
