"""MLP experts that compute rows sorted by expert, on one device or on several."""

import itertools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Bool, Float

from vmoe.axes import Routing
from vmoe.config import MoEConfig
from vmoe.config.experts import Implementation
from vmoe.errors import require
from vmoe.nn import keys
from vmoe.nn.experts.mlps import StackedMlps
from vmoe.nn.keys import MaybeKey
from vmoe.routing.exchange import (
    buffer_rows,
    copies,
    exchange,
    most_loaded,
    received,
    split_off,
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
        transfer: casts rows on their way to the experts and back.
        dtype: of the computation.
        settings: of the layer.
    """

    experts: StackedMlps
    implementation: Implementation
    placement: Placement
    transfer: Callable[[Array], Array]
    dtype: jax.typing.DTypeLike
    settings: MoEConfig

    def __call__(
        self,
        rows: Float[Array, "g s d"],
        routing: Routing,
        key: MaybeKey,
        factor: float | None,
    ) -> tuple[Float[Array, "g s d"], Routing]:
        """The outputs for all tokens, and the routing without what found no place in a buffer.

        Args:
            factor: see ``MoEConfig.ragged_buffer_factor``.
        """
        placement, k = self.placement, self.settings.router.k
        hot = min(self.settings.hot_experts, self.experts.num_experts)
        if placement.devices == 1:
            return self._of_device(rows, routing, key), routing
        graph, state = nnx.split(self.experts)
        buffer = buffer_rows(routing, placement.devices, placement.expert, k, factor)

        def on_device(rows: Array, routing: Routing, state: Any, key: MaybeKey) -> Any:
            key = None if key is None else jax.random.fold_in(key, jax.lax.axis_index(ALL))
            own = self._replace(experts=nnx.merge(graph, state))
            if placement.expert == 1:  # all experts are here
                return own._of_device(rows, routing, key), routing
            rest, outputs, kept = routing, jnp.zeros(()), jnp.zeros((), bool)
            if hot:
                numbers = most_loaded(routing, hot, ALL)
                some, rest = split_off(routing, numbers)
                state = jax.tree.map(lambda x: copies(x, numbers, EXPERT), state)
                copied = self._replace(experts=nnx.merge(graph, state))
                hot_key = None if key is None else jax.random.fold_in(key, 1)
                outputs, kept = copied._of_device(rows, some, hot_key), some.kept
            sent, fits = own._sent(rows, rest, key, buffer)
            if factor is not None:
                routing = without_overflow(routing, kept | fits)
            return outputs + sent, routing

        return placement.on_each_expert_device(on_device)(rows, routing, state, key)

    def _sent(
        self, rows: Float[Array, "g s d"], routing: Routing, key: MaybeKey, buffer: int
    ) -> tuple[Float[Array, "g s d"], Bool[Array, "g s k"]]:
        """The outputs of experts on other devices, and which choices were sent.

        Args:
            buffer: number of rows that are sent to each device.
        """
        there = exchange(routing, self.placement.expert, buffer)
        one_group = self.transfer(rows).reshape(1, -1, rows.shape[-1])
        sent, own = dispatch(one_group, there.routing), routing.choices.shape[1]
        own //= self.placement.expert
        expected = routing.slots.size // self.settings.transfer_chunks

        def compute(key: MaybeKey, sent: Array, experts: Array) -> Array:
            there, numbers = (jax.lax.all_to_all(x[0], EXPERT, 0, 0) for x in (sent, experts))
            outputs = self._of_device(there, received(numbers, own), key, expected)
            outputs = self.transfer(outputs.astype(self.dtype))
            return jax.lax.all_to_all(outputs, EXPERT, 0, 0)[None]

        chunks = self.settings.transfer_chunks
        outputs = in_chunks(compute, chunks, key, sent, there.experts[None])
        fits = there.routing.kept.reshape(routing.slots.shape)
        return combine(outputs, there.routing).reshape(rows.shape), fits

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
        one_group = self.transfer(rows).reshape(1, -1, rows.shape[-1])  # 1 gs d
        sorted_rows = dispatch(one_group, routing)[0, 0].astype(self.dtype)  # r d
        outputs = self.experts.on_rows(self.implementation, block, sorted_rows, sizes, key)
        return combine(self.transfer(outputs)[None, None], routing).reshape(rows.shape)


def in_chunks(
    compute: Callable[..., Float[Array, "g e c x"]],
    chunks: int,
    key: MaybeKey,
    *slots: Any,
) -> Float[Array, "g e c x"]:
    """``compute(key, *slots)`` for each of some parts of the slots, joined.

    Args:
        slots: trees of arrays (g, e, c, ...).

    Raises:
        UsageError: there are more parts than slots of an expert.
    """
    if chunks == 1:
        return compute(key, *slots)
    c = jax.tree.leaves(slots)[0].shape[2]
    require(
        chunks <= c,
        f"there are {c} slots or rows to divide: use at most {c}",
        transfer_chunks=chunks,
    )

    def part(i: int, j: int) -> Any:
        return jax.tree.map(lambda x: x[:, :, i:j], slots)

    edges = itertools.pairwise(c * i // chunks for i in range(chunks + 1))
    each = zip(keys.split(key, chunks), edges, strict=True)
    return jnp.concatenate([compute(key, *part(i, j)) for key, (i, j) in each], axis=2)
