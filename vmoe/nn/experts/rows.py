"""MLP experts that compute rows sorted by expert, on one device or on several."""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
from flax import nnx
from jaxtyping import Array, Float, Int

from vmoe.axes import Routing
from vmoe.config.experts import Implementation
from vmoe.nn.experts.mlps import StackedMlps
from vmoe.nn.keys import MaybeKey
from vmoe.routing.exchange import Exchange, buffer_rows, received, send
from vmoe.routing.layout import combine, dispatch
from vmoe.routing.rows import block_size, sort_rows
from vmoe.sharding import ALL, Placement


class RowExperts(NamedTuple):
    """How the experts of a layer compute rows.

    Attributes:
        experts: of all devices, or of one.
        implementation: "blocked" or "ragged".
        placement: the devices of groups and experts.
        transfer: casts rows on their way to the experts and back.
        dtype: of the computation.
    """

    experts: StackedMlps
    implementation: Implementation
    placement: Placement
    transfer: Callable[[Array], Array]
    dtype: jax.typing.DTypeLike

    def on_one_device(
        self,
        rows: Float[Array, "g s d"],
        routing: Routing,
        key: MaybeKey,
        choices: int | None = None,
    ) -> Float[Array, "g s d"]:
        """The outputs for the tokens of all groups.

        Args:
            choices: how many are expected, if fewer than there is room for.
        """
        block = block_size(routing, self.implementation, self.placement.platform, choices)
        routing, sizes = sort_rows(routing, block=block)
        one_group = self.transfer(rows).reshape(1, -1, rows.shape[-1])  # 1 gs d
        sorted_rows = dispatch(one_group, routing)[0, 0].astype(self.dtype)  # r d
        outputs = self.experts.on_rows(self.implementation, block, sorted_rows, sizes, key)
        return combine(self.transfer(outputs)[None, None], routing).reshape(rows.shape)

    def exchange(self, routing: Routing, k: int, factor: float | None) -> Exchange:
        """How rows travel between several devices.

        Args:
            k: experts per token, a mean where tokens have different numbers of experts.
            factor: see ``MoEConfig.ragged_buffer_factor``.
        """
        receivers = self.placement.expert
        c = buffer_rows(routing, self.placement.devices, receivers, k, factor)
        of_device = functools.partial(send, receivers=receivers, c=c)
        return self.placement.on_each_device(of_device)(routing)

    def on_devices(
        self, rows: Float[Array, "g s d"], exchange: Exchange, key: MaybeKey
    ) -> Float[Array, "g x c d"]:
        """The outputs of several devices, for the rows that each of them sends.

        Args:
            rows: the tokens of each device, as those of a group.
        """
        graph, state = nnx.split(self.experts)
        e = self.experts.num_experts // self.placement.expert
        _, s, k = exchange.routing.slots.shape

        def on_device(
            rows: Float[Array, "g 1 c d"], numbers: Int[Array, "g 1 c"], state: Any, key: MaybeKey
        ) -> Float[Array, "g 1 c d"]:
            key = None if key is None else jax.random.fold_in(key, jax.lax.axis_index(ALL))
            own = self._replace(experts=nnx.merge(graph, state))
            outputs = own.on_one_device(rows[:, 0], received(numbers[:, 0], e), key, s * k)
            return self.transfer(outputs.astype(self.dtype))[:, None]

        sent = self.placement.to_experts(dispatch(self.transfer(rows), exchange.routing))
        numbers = self.placement.to_experts(exchange.experts)
        outputs = self.placement.on_each_expert_device(on_device)(sent, numbers, state, key)
        return self.placement.from_experts(outputs)
