"""The MoE layer: group, route, dispatch, experts, combine, ungroup."""

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Bool, Float

from vmoe.axes import Decision, Record, Route, RouterInputs, Routing, SoftRouting
from vmoe.config import MoEConfig
from vmoe.config.model import Gelu, Implementation
from vmoe.nn import keys
from vmoe.nn.experts import Experts
from vmoe.nn.gates import GATES, Gate
from vmoe.nn.keys import MaybeKey, Rngs
from vmoe.nn.mlp import Hidden
from vmoe.routing import aux_losses, router_of
from vmoe.routing.groups import group, ungroup
from vmoe.routing.layout import combine, dispatch
from vmoe.routing.rows import block_size, flatten, keep_class_tokens, sort_rows
from vmoe.sharding import ONE_DEVICE, Placement


class MoE(nnx.Module):
    """Mixture of experts, which replaces the MLP of a block (V-MoE, section 2).

    Parameters: ``router`` (the gate's parameters) and ``experts``.
    """

    def __init__(
        self,
        width: int,
        mlp_dim: int,
        tokens: int,
        config: MoEConfig,
        *,
        gelu: Gelu = "tanh",
        placement: Placement = ONE_DEVICE,
        rngs: Rngs,
    ):
        """``tokens``: number of tokens per image, for gates whose slots depend on it."""
        self.config = config
        self.placement = placement
        self.router = GATES[config.router.logits_per](width, tokens, config, rngs=rngs)
        self.experts = Experts(
            config.num_experts,
            width,
            mlp_dim,
            hidden=Hidden(gelu, config.expert_dropout),
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
        decide: Route | None = None,
    ) -> tuple[Float[Array, "b x d"], Record]:
        """The experts' weighted outputs for every token, and the record of the routing.

        Args:
            valid: False for images that only pad the batch.
            class_token_only: return the outputs of each image's first token only; all tokens
                are routed.
            decide: replaces the config's router.
        """
        b, n, _ = tokens.shape
        router_key, experts_key = keys.split(key, 2)
        per_group, devices = self.config.images_per_group, self.placement.devices
        groups, group_valid = group(tokens, valid, per_group, devices)  # g s d, g s
        record = self.route(groups, group_valid, router_key, decide)
        routing = record.routing
        if class_token_only:
            groups, routing = keep_class_tokens(groups, routing, n)
            n = 1
        outputs = self._through_experts(self._transfer(groups), routing, tokens.dtype, experts_key)
        return ungroup(outputs.astype(tokens.dtype), b, n, devices), record

    def route(
        self,
        groups: Float[Array, "g s d"],
        valid: Bool[Array, "g s"],
        key: MaybeKey = None,
        decide: Route | None = None,
    ) -> Record:
        """Routes each group independently; see the function ``route``."""
        return route(self.router, groups, valid, key, self.config, self.placement, decide)

    def _through_experts(
        self,
        groups: Float[Array, "g s d"],
        routing: Routing | SoftRouting,
        dtype: jax.typing.DTypeLike,
        key: MaybeKey,
    ) -> Float[Array, "g x d"]:
        """Dispatch, experts, combine: by slots, or by rows sorted over all groups."""
        implementation = choose_implementation(self.config, routing, self.placement.devices)
        if implementation == "batched":
            slots = self.placement.to_experts(dispatch(groups, routing, mixture_dtype=dtype))
            outputs = self._transfer(self.experts(slots.astype(dtype), key))  # g e c d
            return combine(self.placement.from_experts(outputs), routing)
        assert isinstance(routing, Routing)  # soft routing is always batched
        block = None if implementation == "ragged" else block_size(routing)
        routing, sizes = sort_rows(routing, block=block or 1)
        rows = dispatch(flatten(groups), routing)[0, 0].astype(dtype)  # r d
        rows = self._transfer(self.experts.on_rows(rows, sizes, key, block=block))
        return combine(rows[None, None], routing).reshape(groups.shape)

    def _transfer(self, rows: jax.Array) -> jax.Array:
        """Casts rows to the dtype of transfers to the experts and back."""
        return rows.astype(jnp.bfloat16) if self.config.transfer_dtype == "bfloat16" else rows


def route(
    gate: Gate,
    groups: Float[Array, "g s d"],
    valid: Bool[Array, "g s"],
    key: MaybeKey,
    config: MoEConfig,
    placement: Placement = ONE_DEVICE,
    decide: Route | None = None,
) -> Record:
    """Routes each group independently: the gate computes logits, the router decides.

    Args:
        valid: False for padding.
        key: for the noise and a random priority; None in evaluation.
        decide: replaces the config's router.
    """
    router = router_of(config)
    noise_key, draw_key = keys.split(key, 2)
    logits = gate(groups)  # g s e, or g s e c for logits per slot
    draw = None
    if config.router.random_priority and draw_key is not None:
        draw = jax.random.uniform(draw_key, valid.shape)
    inputs = RouterInputs(
        logits,
        noise=gate.noise(logits.shape, noise_key),
        valid=valid,
        draw=draw,
    )
    capacity = router.capacity(config, groups.shape[1])
    chosen: Route = jax.named_scope("router")(decide or router.route)
    on_devices = placement.on_each_device(lambda inputs: chosen(inputs, config, capacity))
    decision: Decision = on_devices(inputs)
    aux_loss = aux_losses.total(decision.losses, config.router.aux_loss, valid)
    return Record(logits, *decision, aux_loss, valid)


def choose_implementation(
    config: MoEConfig, routing: Routing | SoftRouting, devices: int = 1
) -> Implementation:
    """The config's implementation; for "auto", one that suits the platform and the shapes.

    "auto" is ``blocked`` on a CPU; elsewhere ``batched`` if there are about as many slots as
    choices, and ``ragged`` if there are many more slots. Soft routing, which fills every slot, is
    always ``batched``. So is any routing on several devices, since these exchange slots.
    """
    if isinstance(routing, SoftRouting) or devices > 1:
        return "batched"
    if config.implementation != "auto":
        return config.implementation
    if jax.default_backend() == "cpu":
        return "blocked"
    g, s, k = routing.slots.shape
    return "batched" if routing.choices.size <= 1.25 * g * s * k else "ragged"
