"""The MoE layer: group, route, dispatch, experts, combine, ungroup."""

import functools
import math
from collections.abc import Iterable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Bool, Float

from vmoe.axes import Decision, Record, Route, RouterInputs, Routing, SoftRouting
from vmoe.config import AnyRouter, Exchange, MoEConfig, TokenChoice
from vmoe.config.experts import Activation, Implementation, sends_rows
from vmoe.errors import UsageError, require
from vmoe.host import forks
from vmoe.nn import keys
from vmoe.nn.experts import Experts, Slots, StackedMlps, about, experts_of
from vmoe.nn.experts.interface import check_names
from vmoe.nn.experts.make import make_experts
from vmoe.nn.experts.rows import RowExperts, in_chunks, in_transit
from vmoe.nn.experts.shared import on_tokens_alone, shared_outputs
from vmoe.nn.gates import GATES
from vmoe.nn.gates.interface import about_tokens, inputs_of_gate, inputs_of_router, logits_of
from vmoe.nn.inputs import as_tokens, check_mask, check_per_token
from vmoe.nn.keys import MaybeKey, Rngs
from vmoe.nn.mlp import Hidden
from vmoe.nn.router_state import RouterState, next_state
from vmoe.routing import aux_losses
from vmoe.routing.groups import Groups
from vmoe.routing.layout import combine, dispatch, dispatch_rows, fill_empty, fill_padding, scaled
from vmoe.routing.load import expert_totals, group_sums
from vmoe.routing.rows import keep_class_tokens
from vmoe.sharding import ONE_DEVICE, Placement

FINITE_PARTS = (StackedMlps, nnx.Linear, type(None), *GATES.values())
"""They act on each row alone, are finite for any finite row and have no statistics of rows."""


class MoE(nnx.Module):
    """Mixture of experts with any modules as experts, any gate and any router.

    In a V-MoE it replaces the MLP of a block (V-MoE, section 2). ``layer.experts[3]`` is expert 3
    as a module of its own.

    Parameters: ``gate`` and ``experts``, and ``shared`` and ``shared_gate`` if it has them.

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
        router: AnyRouter | None = None,
        *,
        group: int | None = None,
        shared: Experts | nnx.Module | None = None,
        shared_gate: nnx.Module | None = None,
        routed_scale: float = 1.0,
        exchange: Exchange | None = None,
        placement: Placement = ONE_DEVICE,
    ):
        """Makes a layer of existing modules.

        It starts with their values. A variable that several of the experts, the gate and the shared
        expert hold stays one; for what one expert holds with a module outside of the layer, give
        ``experts_of(modules, beside=[gate, outside])`` as experts.

        Args:
            experts: one module for each expert, or one of ``nnx.vmap``, see ``experts_of``; or
                experts that are computed together, such as ``StackedMlps``.
            gate: maps the tokens of sequences f[b n d] to logits f[b n e], or to ``NoisyLogits``;
                what else it names in ``takes`` it gets by name, see ``Gate``. Its statistics and
                random streams, if it has any, change under ``nnx.jit`` as in any module. None for a
                router that reads no logits.
            router: the router, ours or your own, with its capacity; token choice by default.
            group: maximum number of tokens that compete for slots; a longer sequence is cut evenly.
                If None, a group has the router's ``images_per_group`` whole sequences.
            shared: a further expert, or ``Experts`` of which all are used. They act on tokens
                alone, and their outputs are added for every token.
            shared_gate: maps tokens f[b n d] to logits f[b n 1], whose sigmoid multiplies the
                outputs of the shared experts; None for no such gate.
            routed_scale: see ``MoEConfig``.
            exchange: how rows or slots travel to the experts and back; None as in ``Exchange()``.
            placement: the devices over which groups and experts are split.

        Raises:
            UsageError: an expert is not a module, the router does not fit the experts or the gate,
                or the exchange does not fit these or the placement.
        """
        self.experts = experts_of(experts, _modules(gate, shared, shared_gate))
        self.gate = gate
        beside = _modules(self.experts, gate, shared_gate)
        self.shared = None if shared is None else on_tokens_alone(shared, beside)
        self.shared_gate = shared_gate
        self.router = router or TokenChoice()
        self.group, self.placement = group, placement
        self.routed_scale, self.exchange = routed_scale, exchange or Exchange()
        self._check_parts()
        state = self.router.initial_state(self.experts.num_experts)
        variables = {name: RouterState(x) for name, x in state.items()}
        self.state = nnx.Dict(variables) if variables else None

    def _check_parts(self) -> None:
        """Checks that the parts fit each other."""
        if not isinstance(self.router, AnyRouter):
            own = type(self.router).__name__
            raise UsageError("give a router, such as TokenChoice()", router=own)
        gate, router, group = self.gate, self.router, self.group
        kind = router.kind or type(router).__name__
        MoEConfig(  # checks what they have in common
            self.experts.num_experts,
            router=router,
            routed_scale=self.routed_scale,
            exchange=self.exchange,
        )
        chunks = self.exchange.chunks
        stacked = isinstance(self.experts, StackedMlps) or chunks == 1
        require(stacked, "only stacked MLPs can be sent in parts", **{"exchange.chunks": chunks})
        self.placement.check_levels(self.exchange)
        if gate is not None and not callable(gate):
            raise UsageError("give a module that makes logits", gate=type(gate).__name__)
        reads = f"a {kind} router reads logits: give a gate"
        require(not router.learned or gate is not None, reads)
        require(router.learned or gate is None, f"a {kind} router reads no logits: give no gate")
        whole = group is None or (isinstance(group, int) and group > 0)
        require(whole, "use a number of at least 1 token", group=group)
        of_one = "a soft router mixes the tokens of one sequence: leave it out"
        require(group is None or router.logits_per != "slot", of_one, group=group)
        if self.shared is None and self.shared_gate is not None:
            own = type(self.shared_gate).__name__
            raise UsageError("there is no shared expert: leave it out", shared_gate=own)

    @classmethod
    def from_config(
        cls,
        config: MoEConfig,
        width: int,
        mlp_dim: int,
        tokens: int,
        *,
        activation: Activation = "gelu_tanh",
        dtype: jax.typing.DTypeLike | None = None,
        placement: Placement = ONE_DEVICE,
        rngs: Rngs,
    ) -> "MoE":
        """A new layer with the gate and the experts of a config.

        Args:
            width: width d of the tokens.
            mlp_dim: hidden width f of MLPs, unless the config has another one.
            tokens: number of tokens of an image, for gates whose slots depend on it.
            activation: of MLPs, unless the config has another one.
            dtype: data type in which experts other than MLPs compute; if None, they compute in
                float32. MLPs compute in the data type of the tokens.
        """
        gate = config.gate_config
        if gate is not None:
            gate = GATES[type(gate)](width, tokens, config, rngs=rngs)
        experts = make_experts(
            config, width, mlp_dim, activation=activation, dtype=dtype, rngs=rngs
        )
        shared = shared_gate = None
        if config.shared_experts:
            hidden = Hidden(activation, config.experts.dropout)
            f = config.shared_experts * mlp_dim
            shared = StackedMlps(1, width, f, hidden=hidden, rngs=rngs)
        if config.shared_gate:
            shared_gate = nnx.Linear(width, 1, use_bias=False, rngs=rngs)
        return cls(
            experts,
            gate,
            config.router,
            shared=shared,
            shared_gate=shared_gate,
            routed_scale=config.routed_scale,
            exchange=config.exchange,
            placement=placement,
        )

    def __call__(self, tokens: Float[Array, "*b d"], *args: Any, **kwargs: Any) -> jax.Array:
        """The experts' weighted outputs for every token, f[*b x]; see ``forward``."""
        return self.forward(tokens, *args, **kwargs)[0]

    def forward(
        self,
        tokens: Float[Array, "*b d"],
        *args: Any,
        mask: jax.Array | None = None,
        key: MaybeKey = None,
        per_token: Mapping[str, Any] | None = None,
        class_token_only: bool = False,
        decide: Route | None = None,
        **kwargs: Any,
    ) -> tuple[jax.Array, Record]:
        """The experts' weighted outputs for every token, f[*b x], and the record of the routing.

        Tokens (n, d) are one sequence. With more axes, the first one has the sequences, such as
        images, and those between are the tokens of a sequence.

        Args:
            args: further inputs of every expert, which each of them gets as they are.
            mask: bool (*b), False for tokens that only pad a sequence or the batch. They take no
                slots, count in no loss, and have zeros as outputs. Their values are finite.
            key: a random key in training, also for a router without noise; None in evaluation,
                where the router may have another capacity or rule. For noise, the draws of the
                router and dropout of MLP experts. Other modules have random streams of their
                own, and follow ``train()`` and ``eval()``.
            per_token: further inputs with a row for each token: arrays (*b, ...), or trees of
                these, by name. The gate and the router get those that they name in ``takes``; each
                expert gets all others, for the tokens in its slots.
            class_token_only: return the outputs of each image's first token only, f[b 1 x]; all
                tokens are routed.
            decide: replaces the router.
            kwargs: as ``args``, by name.

        Raises:
            UsageError: the gate's logits do not fit the router, the gate or the experts cannot take
                these tokens, the experts' outputs differ in width, an input of the gate is missing,
                one has a name by which experts get what the layer knows, the devices cannot share
                the batch evenly, or the tokens are on a mesh with Explicit axes.
        """
        forks.check()
        tokens = as_tokens(tokens)
        router_key, experts_key = keys.split(key, 2)
        images, valid, inputs = self._sequences(tokens, mask, per_token or {})
        of_gate = inputs_of_gate(self.gate, inputs)
        of_router = inputs_of_router(self.router, inputs)
        inputs = {name: x for name, x in inputs.items() if name not in of_gate | of_router}
        check_names(self.experts, inputs.keys(), kwargs)
        (b, n), devices = valid.shape, self.placement.devices
        size = self.group or self.router.images_per_group * max(1, n)
        groups = Groups.of(b, n, size, devices)
        record = self.route(
            images, valid, router_key, decide, groups=groups, inputs=of_gate, of_router=of_router
        )
        routing, real, kept, dtype = record.routing, record.valid, groups, tokens.dtype
        rows, inputs = jax.tree.map(groups.split, (images, inputs))
        exchange = self.exchange if key is not None else self.exchange.in_evaluation()
        if class_token_only and groups.parts == 1 and not self.experts.asks and not inputs:
            rows, routing = keep_class_tokens(rows, routing, groups.n)
            kept, real = groups._replace(n=1), real[:, :: groups.s // rows.shape[1]]
            exchange = exchange.at_once
        outputs, routing = self._through_experts(
            rows, inputs, routing, real, groups, dtype, experts_key, exchange, *args, **kwargs
        )
        if exchange.buffer_factor is not None and isinstance(record.routing, Routing):
            assert isinstance(routing, Routing)
            weights = jnp.where(routing.kept, record.routing.weights, 0)
            record = record._replace(routing=routing._replace(weights=weights))
        if hasattr(self, "__captures__"):  # inside nnx.capture, see capture_records
            self.sow(nnx.Intermediate, "record", record)
        outputs = kept.join(outputs.astype(dtype))  # b n x
        if class_token_only:
            outputs, images, valid = outputs[:, :1], images[:, :1], valid[:, :1]
        outputs = self._with_shared(outputs, images, key)
        if mask is not None and (self.shared is not None or isinstance(routing, SoftRouting)):
            outputs = jnp.where(valid[..., None], outputs, 0)
        axes = valid.shape if class_token_only else tokens.shape[:-1]
        return outputs.reshape(*axes, outputs.shape[-1]), record

    def _sequences(
        self, tokens: Float[Array, "*b d"], mask: jax.Array | None, per_token: Mapping[str, Any]
    ) -> tuple[Float[Array, "b n d"], Bool[Array, "b n"], dict[str, Any]]:
        """The tokens, the mask and the inputs per token of b sequences of n tokens."""
        check_per_token(per_token, tokens.shape[:-1])
        if mask is not None:
            check_mask("mask", mask, tokens.shape[:-1])
        self.placement.check_axes(tokens)
        b, *axes = tokens.shape[:-1] if tokens.ndim > 2 else (1, *tokens.shape[:-1])
        if tokens.ndim > 2 or self.router.logits_per == "slot":  # else the sequence is cut
            self.placement.check_batch(b)
        shape, last = (b, math.prod(axes)), tokens.ndim - 1
        images, inputs = jax.tree.map(
            lambda x: x.reshape(*shape, *x.shape[last:]), (tokens, dict(per_token))
        )
        if mask is None:
            return images, jnp.ones(shape, bool), inputs
        valid, devices = mask.reshape(shape), self.placement.devices
        parts = (self.experts, self.gate, self.shared, self.shared_gate)
        if not all(type(part) in FINITE_PARTS for part in parts):
            shares = devices if b % devices == 0 else 1
            fill = functools.partial(fill_padding, mask=valid, shares=shares)
            images, inputs = jax.tree.map(fill, (images, inputs))
        return images, valid, inputs

    def route(
        self,
        images: Float[Array, "b n d"],
        valid: Bool[Array, "b n"],
        key: MaybeKey = None,
        decide: Route | None = None,
        *,
        groups: Groups | None = None,
        inputs: Mapping[str, Any] | None = None,
        of_router: Mapping[str, Any] | None = None,
    ) -> Record:
        """Routes each group independently: the gate computes logits, the router decides.

        Args:
            valid: False for padding.
            key: for the noise and the draws of the router; None in evaluation.
            decide: replaces the router.
            groups: how the tokens are grouped; if None, each group is a sequence.
            inputs: the inputs per token of the gate, (b, n, ...), by name.
            of_router: those of the router.

        Raises:
            UsageError: the tokens are not one float array, ``valid`` does not fit them, or ``key``
                is not one key.
        """
        images = as_tokens(images)
        require(images.ndim == 3, f"tokens of shape {images.shape}: use (b, n, d)")
        check_mask("valid", valid, images.shape[:-1])
        router = self.router.in_evaluation() if key is None else self.router
        gate, e = self.gate, self.experts.num_experts
        noise = noise_std = draw = state = None
        groups = groups or Groups(*valid.shape)
        noise_key, draw_key = keys.split(key, 2)
        if gate is None:
            made, std = jnp.zeros((groups.g, groups.s, e), jnp.float32), None
        else:
            known = about_tokens(gate, valid, groups, noise_key) | dict(inputs or {})
            made, std = logits_of(gate, router, e, images, noise_key, known)
            made = groups.split(made)
        if isinstance(std, jax.Array):  # the gate determines it
            std = noise_std = groups.split(std, 1)
        if std is not None and noise_key is not None:
            noise = jax.random.normal(noise_key, made.shape, jnp.float32) * std
        valid = groups.split(valid)
        if draw_key is not None:
            draw = jax.random.uniform(draw_key, valid.shape, jnp.float32)
        if self.state is not None:
            of_groups = {
                x: jnp.broadcast_to(v[...], (groups.g, *v.shape)) for x, v in self.state.items()
            }
            state = jax.lax.stop_gradient(of_groups)
        per_token = jax.tree.map(groups.split, dict(of_router or {}))
        given = RouterInputs(
            made, noise, valid, draw, noise_std, groups.positions, state, per_token or None
        )
        c = router.slots(groups.s, e)

        @jax.named_scope("router")
        def chosen(inputs: RouterInputs) -> Decision:
            return _decide(router, inputs, c) if decide is None else decide(inputs, router, c)

        decision = self.placement.on_each_device(chosen)(given)
        if router.losses_over != "group" and decide is None:
            decision = self._with_losses_of_sums(decision, valid)
        aux_loss = aux_losses.total(decision.losses, router.aux_loss, valid)
        return Record(made, *decision, aux_loss, valid)

    def _with_losses_of_sums(self, decision: Decision, valid: Bool[Array, "g s"]) -> Decision:
        """Adds the losses over a device or the batch, of which each group has the value."""
        router, g = self.router, len(valid)
        parts = self.placement.devices if router.losses_over == "device" else 1
        sums = group_sums(decision, valid) | decision.sums
        sums = jax.tree.map(lambda x: x.reshape(parts, -1, *x.shape[1:]).sum(1), sums)
        losses = jax.vmap(router.losses_of_sums)(sums)  # of each part
        by_group = {name: jnp.repeat(x, g // parts) for name, x in losses.items()}
        return decision._replace(losses=decision.losses | by_group)

    def update_state(self, record: Record) -> None:
        """Changes the router's state after a step of training, if it has one; in place.

        For a layer in a model of your own. A ``ViT`` has ``vmoe.nn.router_state.with_next_states``.
        Inside a ``jax.shard_map`` the state follows the load of all its devices.

        Args:
            record: the routing of the batch, as ``forward`` returned it.
        """
        if self.state is not None:
            state = {name: x[...] for name, x in self.state.items()}
            new = next_state(self.router, state, expert_totals(record))
            for name, x in new.items():
                self.state[name][...] = x

    def implementation_for(self, routing: Routing | SoftRouting) -> Implementation:
        """How the experts compute a routing: by slots, unless they are ``StackedMlps``.

        Soft routing fills every slot. On several devices it depends on what they send each other.
        """
        experts, several = self.experts, self.placement.devices > 1
        if not isinstance(routing, Routing) or not isinstance(experts, StackedMlps):
            return "batched"
        if several and not sends_rows(experts.implementation, dropless=self.router.dropless):
            return "batched"
        return experts.implementation_for(routing, self.placement.platform, rows=several)

    def _through_experts(
        self,
        rows: Float[Array, "g s d"],
        inputs: Mapping[str, Any],
        routing: Routing | SoftRouting,
        valid: Bool[Array, "g s"],
        groups: Groups,
        dtype: jax.typing.DTypeLike,
        key: MaybeKey,
        exchange: Exchange,
        /,
        *args: Any,
        **kwargs: Any,
    ) -> tuple[jax.Array, Routing | SoftRouting]:
        """Dispatch, experts, combine: by slots, or by rows sorted by expert.

        Args:
            inputs: what the experts take besides, (g, s, ...), by name.

        Returns:
            the outputs (g, s, x), and the routing without what found no place in a buffer.
        """
        routing = scaled(routing, self.routed_scale)
        if by_rows := self._by_rows(routing, exchange, dtype):
            assert isinstance(routing, Routing)  # soft routing fills slots
            by_rows.experts.check_inputs(rows, args, kwargs | dict(inputs))
            return by_rows(rows, routing, key, self.router.k)
        rows = in_transit(rows, exchange)
        if isinstance(routing, SoftRouting) or isinstance(self.experts, StackedMlps):
            filled, tokens = routing, dispatch(rows, routing, mixture_dtype=dtype)
        else:
            filled = fill_empty(routing, valid)
            tokens = dispatch_rows(rows, filled)
        known = {name: about(name, routing, filled, groups) for name in sorted(self.experts.asks)}
        inputs = known | jax.tree.map(lambda x: dispatch_rows(x, filled), dict(inputs))

        def compute(key: MaybeKey, tokens: jax.Array, inputs: Any) -> jax.Array:
            tokens, inputs = jax.tree.map(self.placement.to_experts, (tokens, inputs))
            slots = Slots(groups.n, groups.s, inputs)
            outputs = self.experts(tokens.astype(dtype), slots, key, *args, **kwargs)  # g e c x
            return self.placement.from_experts(in_transit(outputs, exchange))

        chunks = exchange.chunks if self.placement.expert > 1 else 1
        outputs = in_chunks(compute, chunks, key, tokens, inputs)
        return combine(outputs, routing), routing

    def _by_rows(
        self, routing: Routing | SoftRouting, exchange: Exchange, dtype: jax.typing.DTypeLike
    ) -> RowExperts | None:
        """How the experts compute rows; None if they compute slots."""
        implementation = self.implementation_for(routing)
        if implementation == "batched":
            return None
        assert isinstance(self.experts, StackedMlps)  # others compute slots
        return RowExperts(self.experts, implementation, self.placement, exchange, dtype)

    def _with_shared(
        self, outputs: Float[Array, "b n x"], tokens: Float[Array, "b n d"], key: MaybeKey
    ) -> Float[Array, "b n x"]:
        """The routed experts' outputs plus those of all shared experts, if there are any."""
        if self.shared is None:
            return outputs
        shared_key = None if key is None else jax.random.fold_in(key, 2)  # forward has 0 and 1
        return outputs + shared_outputs(
            self.shared, self.shared_gate, tokens, shared_key, outputs.shape[-1]
        ).astype(outputs.dtype)


@functools.partial(jax.jit, static_argnums=(0, 2), inline=True)
def _decide(router: AnyRouter, inputs: RouterInputs, c: int) -> Decision:
    """Compiled as one program where a layer is called without ``jax.jit``."""
    return router(inputs, c)


def _modules(*parts: Any) -> list[nnx.Module]:
    """The parts of a layer that are modules."""
    return [part for part in parts if isinstance(part, nnx.Module)]


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
