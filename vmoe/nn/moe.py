"""The MoE layer: group, route, dispatch, experts, combine, ungroup."""

import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Bool, Float

from vmoe import forks
from vmoe.axes import Decision, Record, Route, RouterInputs, Routing, SoftRouting
from vmoe.config import AnyRouter, MoEConfig, TokenChoice
from vmoe.config.model import Gelu, Implementation
from vmoe.errors import UsageError, require
from vmoe.nn import keys
from vmoe.nn.experts import Copies, Experts, Slots, StackedMlps, about, experts_of
from vmoe.nn.experts.copies import check_expert, shared_variables
from vmoe.nn.experts.interface import check_names
from vmoe.nn.experts.make import make_experts
from vmoe.nn.gates import GATES, NoisyLogits
from vmoe.nn.inputs import check_tokens, taking
from vmoe.nn.keys import MaybeKey, Rngs
from vmoe.nn.mlp import Hidden
from vmoe.nn.router_state import RouterState, next_state
from vmoe.routing import aux_losses
from vmoe.routing.groups import group, ungroup
from vmoe.routing.layout import combine, dispatch, dispatch_inputs, fill_empty, scaled
from vmoe.routing.load import expert_totals
from vmoe.routing.rows import block_size, flatten, keep_class_tokens, sort_rows
from vmoe.sharding import ONE_DEVICE, Placement

OF_PARTS = {
    "experts": "the experts are the modules that are given",
    "gate": "the gate is the module that is given",
    "expert_dropout": "experts that are given have their own dropout",
    "shared_experts": "shared experts are given as `shared`",
    "shared_gate": "their gate is given as `shared_gate`",
    "shared_init": "experts that are given have their values",
}
"""Settings from which ``MoE.from_config`` makes parts of a layer, and what a layer of existing
modules has in their place."""


class MoE(nnx.Module):
    """Mixture of experts with any modules as experts, any gate and any router.

    In a V-MoE it replaces the MLP of a block (V-MoE, section 2). ``layer.experts[3]`` is expert 3
    as a module of its own.

    Parameters: ``router`` (the gate's parameters) and ``experts``.

    Attributes:
        config: the router, the capacity and the groups. What it says about experts and the gate is
            about layers of ``from_config`` alone.

    >>> rngs = nnx.Rngs(0)
    >>> experts = [nnx.Linear(8, 5, rngs=rngs) for _ in range(4)]
    >>> gate = nnx.Linear(8, 4, use_bias=False, rngs=rngs)
    >>> layer = MoE(experts, gate, TokenChoice(k=2))
    >>> nnx.jit(MoE.__call__)(layer, jnp.ones((2, 9, 8))).shape
    (2, 9, 5)
    """

    takes = ()  # as an expert of another layer, see Copies

    def __init__(
        self,
        experts: nnx.Module | Iterable[Any],
        gate: nnx.Module | None,
        router: AnyRouter | MoEConfig | None = None,
        *,
        shared: Experts | nnx.Module | None = None,
        shared_gate: nnx.Module | None = None,
        placement: Placement = ONE_DEVICE,
    ):
        """Makes a layer of existing modules.

        It starts with their values. A variable that several of the experts, the gate and the shared
        expert hold stays one; for what one expert holds with a module outside of the layer, give
        ``experts_of(modules, beside=[gate, outside])`` as experts.

        Args:
            experts: one module for each expert, or one of ``nnx.vmap``, see ``experts_of``; or
                experts that are computed together, such as ``StackedMlps``.
            gate: maps tokens f[g s d] to logits f32[g s e], or to ``NoisyLogits``. Its statistics
                and random streams, if it has any, change under ``nnx.jit`` as in any module. None
                for a router that reads no logits.
            router: the router, ours or your own, token choice by default; or the config of the
                whole layer, with its capacity and its groups, which says nothing about the modules
                that are given.
            shared: a further expert, or ``Experts`` of which all are used. They act on tokens
                alone, and their outputs are added for every token.
            shared_gate: maps tokens f[b n d] to logits f[b n 1], whose sigmoid multiplies the
                outputs of the shared experts; None for no such gate.
            placement: the devices over which groups and experts are split.

        Raises:
            UsageError: an expert is not a module, the number of experts is not the one in the
                config, or the config has settings of experts or of a gate.
        """
        self.experts = experts_of(experts, _modules(gate, shared, shared_gate))
        self.router = gate
        beside = _modules(self.experts, gate, shared_gate)
        self.shared = None if shared is None else _on_tokens_alone(shared, beside)
        if shared is None and shared_gate is not None:
            kind = type(shared_gate).__name__
            raise UsageError("there is no shared expert: leave it out", shared_gate=kind)
        self.shared_gate = shared_gate
        self.placement = placement
        if not isinstance(router, MoEConfig):
            e = self.experts.num_experts
            router = MoEConfig.of_router(e, router or TokenChoice())
        self.config = router
        _check_parts(router, gate, self.experts)
        state = router.router.initial_state(self.experts.num_experts)
        variables = {name: RouterState(x) for name, x in state.items()}
        self.state = nnx.Dict(variables) if variables else None

    @classmethod
    def from_config(
        cls,
        config: MoEConfig,
        width: int,
        mlp_dim: int,
        tokens: int,
        *,
        gelu: Gelu = "tanh",
        dtype: jax.typing.DTypeLike | None = None,
        placement: Placement = ONE_DEVICE,
        rngs: Rngs,
    ) -> "MoE":
        """A new layer with the gate and the experts of a config.

        Args:
            width: width d of the tokens.
            mlp_dim: hidden width f of MLPs, unless the config has another one.
            tokens: number of tokens of an image, for gates whose slots depend on it.
            gelu: activation of MLPs, unless the config has another one.
            dtype: data type in which experts other than MLPs compute; if None, they compute in
                float32. MLPs compute in the data type of the tokens.
        """
        gate = config.gate_config
        if gate is not None:
            gate = GATES[type(gate)](width, tokens, config, rngs=rngs)
        experts = make_experts(config, width, mlp_dim, gelu=gelu, dtype=dtype, rngs=rngs)
        shared = shared_gate = None
        if config.shared_experts:
            shared = StackedMlps(
                1,
                width,
                config.shared_experts * mlp_dim,
                hidden=Hidden(gelu, config.expert_dropout),
                rngs=rngs,
            )
        if config.shared_gate:
            shared_gate = nnx.Linear(width, 1, use_bias=False, rngs=rngs)
        parts = dict(shared=shared, shared_gate=shared_gate)
        layer = cls(experts, gate, config.router, **parts, placement=placement)
        layer.config = config  # which also has the settings of the parts that were made here
        return layer

    def __call__(self, tokens: Float[Array, "*b d"], *args: Any, **kwargs: Any) -> jax.Array:
        """The experts' weighted outputs for every token, f[*b x]; see ``forward``."""
        return self.forward(tokens, *args, **kwargs)[0]

    def forward(
        self,
        tokens: Float[Array, "*b d"],
        *args: Any,
        valid: Bool[Array, "b"] | None = None,
        key: MaybeKey = None,
        per_token: Mapping[str, Any] | None = None,
        class_token_only: bool = False,
        decide: Route | None = None,
        **kwargs: Any,
    ) -> tuple[jax.Array, Record]:
        """The experts' weighted outputs for every token, f[*b x], and the record of the routing.

        The first axis is the image axis: tokens with the same index there belong to one image.

        Args:
            args: further inputs of every expert, which each of them gets as they are.
            valid: False for images that only pad the batch.
            key: for noise, a random priority and dropout of MLP experts; None in evaluation. Other
                modules have random streams of their own, and follow ``train()`` and ``eval()``.
            per_token: further inputs with a row for each token: arrays (*b, ...), or trees of
                these, by name. Each expert gets the rows of the tokens in its slots, by this name.
            class_token_only: return the outputs of each image's first token only, f[b 1 x]; all
                tokens are routed.
            decide: replaces the router.
            kwargs: as ``args``, by name.

        Raises:
            UsageError: the gate's logits do not fit the router, the gate or the experts cannot take
                these tokens, the experts' outputs differ in width, an input has a name by which
                experts get what the layer knows, the devices cannot share the batch evenly, or the
                tokens are on a mesh with Explicit axes.
        """
        forks.check()
        router_key, experts_key = keys.split(key, 2)
        b = len(tokens) if tokens.ndim > 1 else 1
        n, devices = math.prod(tokens.shape[1:-1]), self.placement.devices
        images = tokens.reshape(b, n, tokens.shape[-1])
        valid = jnp.ones(b, bool) if valid is None else valid
        check_tokens(tokens, valid, per_token)
        check_names(self.experts, per_token, kwargs)
        self.placement.check_batch(b)
        self.placement.check_axes(tokens)
        groups, group_valid = group(images, valid, self.config.images_per_group, devices)
        record = self.route(groups, group_valid, router_key, decide, n=n)
        if hasattr(self, "__captures__"):  # inside nnx.capture, see capture_records
            self.sow(nnx.Intermediate, "record", record)
        routing = record.routing
        kept = n
        if class_token_only and not self.experts.asks and not per_token:
            groups, routing = keep_class_tokens(groups, routing, n)
            group_valid = group_valid[:, :: group_valid.shape[1] // groups.shape[1]]
            kept = 1
        inputs = {name: about(name, routing, n) for name in sorted(self.experts.asks)}

        def to_slots(x: jax.Array) -> jax.Array:
            rest = x.shape[tokens.ndim - 1 :]
            rows, _ = group(
                x.reshape(b, n, math.prod(rest)), valid, self.config.images_per_group, devices
            )
            slots = dispatch_inputs(rows, routing, group_valid)
            return slots.reshape(*slots.shape[:-1], *rest)

        inputs |= jax.tree.map(to_slots, dict(per_token or {}))
        slots = Slots(n, groups.shape[1], jax.tree.map(self.placement.to_experts, inputs))
        outputs = self._through_experts(
            groups, group_valid, routing, tokens.dtype, slots, experts_key, *args, **kwargs
        )
        outputs = ungroup(outputs.astype(tokens.dtype), b, kept, devices)  # b x d
        if class_token_only:
            outputs, images = outputs[:, :1], images[:, :1]
        outputs = self._with_shared(outputs, images, key)
        if self.shared is not None:  # it has outputs for padding too
            outputs = jnp.where(valid[:, None, None], outputs, 0)
        axes = outputs.shape[:2] if class_token_only else tokens.shape[:-1]
        return outputs.reshape(*axes, outputs.shape[-1]), record

    def route(
        self,
        groups: Float[Array, "g s d"],
        valid: Bool[Array, "g s"],
        key: MaybeKey = None,
        decide: Route | None = None,
        *,
        n: int | None = None,
    ) -> Record:
        """Routes each group independently: the gate computes logits, the router decides.

        Args:
            valid: False for padding.
            key: for the noise and the draws of the router; None in evaluation.
            decide: replaces the router.
            n: number of tokens of an image; s if None.
        """
        router, (g, s, _), noise = self.config.router, groups.shape, None
        noise_key, draw_key = keys.split(key, 2)
        if router.jitter and noise_key is not None:
            low, high = 1 - router.jitter, 1 + router.jitter
            jitter_key = jax.random.fold_in(noise_key, 1)  # the gate may add noise of its own
            jitter = jax.random.uniform(jitter_key, groups.shape, jnp.float32, low, high)
            groups = groups * jitter
        logits, noise_std = self._logits(groups)
        if noise_std is not None and noise_key is not None:
            noise = jax.random.normal(noise_key, logits.shape, jnp.float32) * noise_std
        inputs = RouterInputs(logits, noise=noise, valid=valid, draw=None)
        if not isinstance(noise_std, float):
            inputs = inputs._replace(noise_std=noise_std)
        if "draw" in router.takes and draw_key is not None:
            inputs = inputs._replace(draw=jax.random.uniform(draw_key, valid.shape, jnp.float32))
        if "positions" in router.takes:
            positions = jnp.arange(s, dtype=jnp.int32) % (n or s)
            inputs = inputs._replace(positions=jnp.broadcast_to(positions, (g, s)))
        if self.state is not None:
            state = {x: jnp.broadcast_to(v[...], (g, *v.shape)) for x, v in self.state.items()}
            inputs = inputs._replace(state=jax.lax.stop_gradient(state))
        c = self.config.slots(s)

        @jax.named_scope("router")
        def chosen(inputs: RouterInputs) -> Decision:
            return router(inputs, c) if decide is None else decide(inputs, router, c)

        decision = self.placement.on_each_device(chosen)(inputs)
        aux_loss = aux_losses.total(decision.losses, router.aux_loss, valid)
        return Record(logits, *decision, aux_loss, valid)

    def _logits(self, groups: Float[Array, "g s d"]) -> NoisyLogits:
        """The gate's logits, with its noise or else the router's."""
        settings, e = self.config.router, self.config.num_experts
        if self.router is None:
            return NoisyLogits(jnp.zeros((*groups.shape[:2], e), jnp.float32), None)
        with taking("the gate", groups.shape):
            outputs = jax.named_scope("gate")(self.router)(groups)
            if isinstance(outputs, NoisyLogits) and outputs.noise_std is not None:
                noise_std = jnp.broadcast_to(outputs.noise_std, outputs.logits.shape)
                outputs = outputs._replace(noise_std=noise_std)
        if not isinstance(outputs, NoisyLogits):
            outputs = NoisyLogits(outputs, settings.noise_std / e if settings.noise_std else None)
        shape = getattr(outputs.logits, "shape", ())
        axes = "g s e c" if settings.logits_per == "slot" else "g s e"
        if len(shape) != len(axes.split()) or shape[:3] != (*groups.shape[:2], e):
            raise UsageError(
                f"the gate makes logits {shape} from tokens {groups.shape}: the {settings.kind} "
                f"router needs ({axes.replace(' ', ', ')}) with e = {e}"
            )
        wide = jnp.result_type(outputs.logits, jnp.float32)
        return outputs._replace(logits=outputs.logits.astype(wide))

    def update_state(self, record: Record) -> None:
        """Changes the router's state after a step of training, if it has one; in place.

        For a layer in a model of your own. A ``ViT`` has ``vmoe.nn.router_state.with_next_states``.
        Inside a ``jax.shard_map`` the state follows the load of all its devices.

        Args:
            record: the routing of the batch, as ``forward`` returned it.
        """
        if self.state is not None:
            state = {name: x[...] for name, x in self.state.items()}
            new = next_state(self.config.router, state, expert_totals(record))
            for name, x in new.items():
                self.state[name][...] = x

    def _through_experts(
        self,
        groups: Float[Array, "g s d"],
        valid: Bool[Array, "g s"],
        routing: Routing | SoftRouting,
        dtype: jax.typing.DTypeLike,
        slots: Slots,
        key: MaybeKey,
        *args: Any,
        **kwargs: Any,
    ) -> jax.Array:
        """Dispatch, experts, combine: by slots, or by rows sorted over all groups."""
        implementation, groups = implementation_of(self, routing), self._transfer(groups)
        routing = scaled(routing, self.config.routed_scale)
        if implementation == "batched":
            tokens = dispatch(groups, routing, mixture_dtype=dtype)
            if isinstance(routing, Routing) and not isinstance(self.experts, StackedMlps):
                tokens = fill_empty(tokens, groups, routing, valid)
            tokens = self.placement.to_experts(tokens)
            outputs = self.experts(tokens.astype(dtype), slots, key, *args, **kwargs)  # g e c x
            outputs = self.placement.from_experts(self._transfer(outputs))
            return combine(outputs, routing)
        assert isinstance(routing, Routing)  # soft routing is always batched
        block = None if implementation == "ragged" else block_size(routing)
        routing, sizes = sort_rows(routing, block=block or 1)
        rows = dispatch(flatten(groups), routing)[0, 0].astype(dtype)  # r d
        assert isinstance(self.experts, StackedMlps)
        outputs = self.experts.on_rows(rows, sizes, slots, key, *args, block=block, **kwargs)
        rows = self._transfer(outputs)
        return combine(rows[None, None], routing).reshape(groups.shape)

    def _with_shared(
        self, outputs: Float[Array, "b n x"], tokens: Float[Array, "b n d"], key: MaybeKey
    ) -> Float[Array, "b n x"]:
        """The routed experts' outputs plus those of all shared experts, if there are any."""
        if self.shared is None:
            return outputs
        n = tokens.shape[1]
        shared_key = None if key is None else jax.random.fold_in(key, 2)  # forward has 0 and 1
        e = self.shared.num_experts
        slots = jnp.broadcast_to(tokens[:, None], (len(tokens), e, *tokens.shape[1:]))
        by_expert = self.shared(slots, Slots(n, n, {}), shared_key)  # b e n x
        widths = by_expert.shape[-1], outputs.shape[-1]
        require(
            widths[0] == widths[1],
            f"the shared expert has outputs of width {widths[0]}, the "
            f"others of {widths[1]}: make them equal",
        )
        total = by_expert.sum(1) if e > 1 else by_expert[:, 0]
        if self.shared_gate is not None:
            with taking("the gate of the shared experts", tokens.shape):
                total = total * jax.nn.sigmoid(self.shared_gate(tokens))
        return outputs + total.astype(outputs.dtype)

    def _transfer(self, rows: jax.Array) -> jax.Array:
        """Casts rows to the dtype of transfers to the experts and back."""
        return rows.astype(jnp.bfloat16) if self.config.transfer_dtype == "bfloat16" else rows


def implementation_of(layer: MoE, routing: Routing | SoftRouting) -> Implementation:
    """The implementation in a layer's config; for "auto", one for the platform and the shapes.

    "auto" is ``blocked`` on a CPU; elsewhere ``batched`` if there are about as many slots as
    choices, and ``ragged`` if there are many more slots. Soft routing, which fills every slot, is
    always ``batched``. So is any routing on several devices, since these exchange slots, and any
    experts other than ``StackedMlps``.
    """
    by_slots = isinstance(routing, SoftRouting) or not isinstance(layer.experts, StackedMlps)
    if by_slots or layer.placement.devices > 1:
        return "batched"
    if layer.config.implementation != "auto":
        return layer.config.implementation
    if jax.default_backend() == "cpu":
        return "blocked"
    g, s, k = routing.slots.shape
    return "batched" if routing.choices.size <= 1.25 * g * s * k else "ragged"


def _modules(*parts: Any) -> list[nnx.Module]:
    """The parts of a layer that are modules."""
    return [part for part in parts if isinstance(part, nnx.Module)]


def _on_tokens_alone(shared: Any, beside: Sequence[nnx.Module]) -> Experts:
    """The shared experts, after checking that they need no slots.

    Args:
        beside: the experts of the layer first, and other modules whose variables stay one.
    """
    if not isinstance(shared, Experts):
        check_expert("the shared expert", shared)
        ids = shared_variables([shared, *beside])
        shared = Copies([shared], shared=ids, numbers=[beside[0].num_experts])
    if asks := shared.asks | (shared.takes - {"key"}):
        asked = ", ".join(sorted(asks))
        raise UsageError(f"the shared expert has no slots: it cannot ask for {asked}")
    return shared


def _check_parts(config: MoEConfig, gate: Any, experts: Experts) -> None:
    """Checks that a gate and experts fit a config, which has no settings of them."""
    e = experts.num_experts
    if gate is not None and not callable(gate):
        raise UsageError("give a module that makes logits", gate=type(gate).__name__)
    require(config.num_experts == e, f"{e} experts were given", num_experts=config.num_experts)
    for name, instead in OF_PARTS.items():
        value = getattr(config, name)
        require(value == getattr(MoEConfig, name), f"{instead}: leave it out", **{name: value})
    chosen = config.implementation not in ("auto", "batched")
    fits = not chosen or isinstance(experts, StackedMlps)
    by_slots = "experts other than StackedMlps are computed slot by slot: use batched"
    require(fits, by_slots, implementation=config.implementation)
    kind, learned = config.router.kind, config.router.learned
    require(not learned or gate is not None, f"a {kind} router reads logits: give a gate")
    reads_none = f"a {kind} router reads no logits: give None as the gate"
    require(learned or gate is None, reads_none)


def capture_records(
    model: nnx.Module, *args: Any, **kwargs: Any
) -> tuple[Any, dict[tuple[str | int, ...], tuple[Record, ...]]]:
    """``model(*args, **kwargs)``, and the records of its MoE layers by path, one for each call.

    A layer that is not called has no record. For any Flax NNX model, also one whose layers are in
    ``nnx.remat``, ``nnx.scan`` or ``nnx.vmap``; under the last two the arrays of a record have one
    more axis in front. There, ``nnx.StateAxes`` must give ``nnx.Intermediate`` the axis 0, as in
    ``nnx.StateAxes({(nnx.Param, nnx.Intermediate): 0, ...: None})``: with None, ``nnx.scan`` keeps
    no record, and ``nnx.vmap`` raises an error. Add the ``aux_loss`` of each record to the loss in
    training. A layer sows its record as an ``nnx.Intermediate``, so ``nnx.capture`` itself works
    too. Inside ``nnx.jit``, unused parts of the records are not computed.
    """
    with nnx.set_graph_mode(True):  # a model can have a module in several places
        layers = {path: part for path, part in nnx.iter_modules(model) if isinstance(part, MoE)}
        # As nnx.capture does for every module; under nnx.remat it fails for an nnx.Sequential.
        for layer in layers.values():
            layer.__captures__ = nnx.data((nnx.Intermediate({}),))
        try:
            outputs = model(*args, **kwargs)
            sown = {path: layer.__captures__[0].get_value() for path, layer in layers.items()}
        finally:
            for layer in layers.values():
                del layer.__captures__
    return outputs, {path: x.get("record", ()) for path, x in sown.items()}
