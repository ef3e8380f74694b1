"""The sparse layer: group, route, dispatch, experts, combine, ungroup."""

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Bool, Float

from vmoe.axes import Record, Routing, SoftRouting
from vmoe.config import MoEConfig, Soft
from vmoe.nn import keys
from vmoe.nn.experts import Experts
from vmoe.nn.gates.linear import Router
from vmoe.nn.gates.soft import SoftRouter
from vmoe.nn.implementations import Implementation
from vmoe.nn.keys import MaybeKey, Rngs
from vmoe.routing.groups import group, ungroup
from vmoe.routing.layout import combine, dispatch
from vmoe.routing.rows import block_size, flatten, keep_class_tokens, sort_rows
from vmoe.sharding import ONE_DEVICE, Placement


class MoE(nnx.Module):
    """Mixture of experts in place of an MLP (V-MoE, section 2)."""

    def __init__(
        self,
        width: int,
        hidden: int,
        tokens: int,
        config: MoEConfig,
        *,
        placement: Placement = ONE_DEVICE,
        rngs: Rngs,
    ):
        """``tokens`` of an image: a soft router's slots are parameters, counted by them."""
        self.config = config
        self.placement = placement
        if isinstance(config.router, Soft):
            self.router = SoftRouter(width, tokens, config, rngs=rngs)
        else:
            self.router = Router(width, config, placement=placement, rngs=rngs)
        self.experts = Experts(
            config.num_experts,
            width,
            hidden,
            dropout=config.expert_dropout,
            shared_init=config.shared_init,
            rngs=rngs,
        )

    def __call__(
        self,
        tokens: Float[Array, "b n d"],
        valid: Bool[Array, "b"],
        key: MaybeKey = None,
        *,
        class_token_only: bool = False,
    ) -> tuple[Float[Array, "b x d"], Record]:
        """The experts' weighted outputs for every token, and the record of the routing.

        Args:
            valid: False for images that only pad the batch.
            class_token_only: the outputs of each image's first token alone are wanted; all are routed.
        """
        b, n, _ = tokens.shape
        router_key, experts_key = keys.split(key, 2)
        per_group, devices = self.config.images_per_group, self.placement.devices
        groups, group_valid = group(tokens, valid, per_group, devices)
        record = self.router(groups, group_valid, router_key)
        routing = record.routing
        if class_token_only:
            groups, routing = keep_class_tokens(groups, routing, n)
            n = 1
        outputs = self._through_experts(self._transfer(groups), routing, tokens.dtype, experts_key)
        return ungroup(outputs.astype(tokens.dtype), b, n, devices), record

    def _through_experts(
        self,
        groups: Float[Array, "g s d"],
        routing: Routing | SoftRouting,
        dtype: jax.typing.DTypeLike,
        key: MaybeKey,
    ) -> Float[Array, "g x d"]:
        """Dispatch, experts, combine: by slots, or by rows sorted over all groups."""
        chosen = choose(self.config, routing, self.placement.devices)
        if chosen == "batched":
            slots = self.placement.to_experts(dispatch(groups, routing)).astype(dtype)
            outputs = self._transfer(self.experts(slots, key))
            return combine(self.placement.from_experts(outputs), routing)
        block = None if chosen == "ragged" else block_size(routing)
        routing, sizes = sort_rows(routing, block=block or 1)
        rows = dispatch(flatten(groups), routing)[0, 0].astype(dtype)
        rows = self._transfer(self.experts.on_rows(rows, sizes, key, block=block))
        return combine(rows[None, None], routing).reshape(groups.shape)

    def _transfer(self, rows: jax.Array) -> jax.Array:
        """CsvWriter as they travel: rounded to bfloat16 if the config says so."""
        return rows.astype(jnp.bfloat16) if self.config.transfer_dtype == "bfloat16" else rows


def choose(config: MoEConfig, routing: Routing | SoftRouting, devices: int = 1) -> Implementation:
    """How the experts compute: as the config says, or as suits the platform and the shapes.

    On a CPU one block after the other. Elsewhere one batched product where the slots are about
    as many as the choices, a ragged product where they are many more; slots that mix tokens are
    always filled, and slots alone travel between devices.
    """
    if isinstance(routing, SoftRouting) or devices > 1:
        return "batched"
    if config.implementation != "auto":
        return config.implementation
    if jax.default_backend() == "cpu":
        return "blocked"
    g, s, k = routing.slots.shape
    return "batched" if routing.choices.size <= 1.25 * g * s * k else "ragged"
