"""The experts of V-MoE: MLPs whose parameters are stacked along e."""

import functools
from collections.abc import Mapping, Sequence
from typing import Any, Literal

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, Int

from vmoe.axes import Routing
from vmoe.config.experts import Implementation
from vmoe.errors import UsageError
from vmoe.nn import implementations, mlp
from vmoe.nn.experts.interface import Experts, Slots
from vmoe.nn.implementations import ExpertLinearParams
from vmoe.nn.keys import InitKeys, MaybeKey, Rngs
from vmoe.nn.mlp import TANH, Hidden
from vmoe.reverse_mode import reverse_only


class ExpertLinear(nnx.Module):
    """A linear layer of each expert: kernel (e, x, y), bias (e, y)."""

    def __init__(
        self, num_experts: int, x: int, y: int, *, halves: int = 1, shared_init: bool, rngs: Rngs
    ):
        """``halves``: 2 for two linear layers next to each other, with y outputs each."""

        def draw(init: nnx.Initializer, *shape: int) -> nnx.Param:
            parts = [
                _per_expert(init, shared_init, rngs.params(), num_experts, *shape)
                for _ in range(halves)
            ]
            return nnx.Param(parts[0] if halves == 1 else jnp.concatenate(parts, axis=-1))

        self.kernel = draw(mlp.kernel_init, x, y)
        self.bias = draw(mlp.bias_init, y)

    def params(self) -> ExpertLinearParams:
        """The parameters as plain arrays."""
        return ExpertLinearParams(self.kernel[...], self.bias[...])


class StackedMlps(Experts):
    """e MLPs, each applied to its own rows.

    Parameters: ``up`` kernel (e, d, f) and bias (e, f), ``down`` kernel (e, f, d), bias (e, d). In
    gated MLPs ``up`` has 2 f outputs, see ``Hidden.gated``.

    Attributes:
        implementation: how they compute; "auto" to choose, see ``implementation_for``.
    """

    def __init__(
        self,
        num_experts: int,
        width: int,
        mlp_dim: int,
        *,
        hidden: Hidden = TANH,
        shared_init: bool = True,
        implementation: Literal["auto", Implementation] = "auto",
        rngs: Rngs,
    ):
        new = functools.partial(ExpertLinear, num_experts, shared_init=shared_init, rngs=rngs)
        self.up = new(width, mlp_dim, halves=2 if hidden.gated else 1)
        self.down = new(mlp_dim, width)
        self.hidden = hidden
        self.implementation: Literal["auto", Implementation] = implementation
        self.num_experts = num_experts

    def implementation_for(
        self, routing: Routing, platform: str, *, rows: bool = False
    ) -> Implementation:
        """The implementation; for "auto", one for the platform and the shapes.

        On a CPU ``blocked`` is chosen. Elsewhere it is ``batched`` while there are about as many
        slots as choices, and ``ragged`` with more, as without a capacity.

        Args:
            platform: "cpu", "gpu" or "tpu".
            rows: whether "auto" computes no slots, as where devices send rows.
        """
        if self.implementation != "auto":
            return self.implementation
        if platform == "cpu":
            return "blocked"
        few = routing.choices.size <= 1.25 * routing.slots.size
        return "batched" if few and not rows else "ragged"

    @jax.named_scope("experts")
    def __call__(
        self,
        tokens: Float[Array, "g e c d"],
        slots: Slots | None = None,
        key: MaybeKey = None,
        /,
        *args: Any,
        **kwargs: Any,
    ) -> Float[Array, "g e c d"]:
        """Applies the experts to slots of fixed capacity."""
        self.check_inputs(tokens, args, kwargs | (slots.inputs if slots else {}))
        up, down, tokens = reverse_only((self.up.params(), self.down.params(), tokens))
        return implementations.batched(up, down, tokens, self.hidden, key)

    def __getitem__(self, number: int) -> nnx.Module:
        """See ``Experts``: an MLP, which computes in the data type of its parameters and tokens."""
        i, (_, d, f) = range(self.num_experts)[number], self.up.kernel.shape
        width = f // 2 if self.hidden.gated else f
        make = functools.partial(mlp.Mlp, d, width, hidden=self.hidden, rngs=InitKeys(0))
        expert = nnx.eval_shape(make)
        nnx.update(expert, jax.tree.map(lambda x: x[i], nnx.state(self)))
        return expert

    @jax.named_scope("experts")
    def on_rows(
        self,
        implementation: Implementation,
        block: int,
        rows: Float[Array, "r d"],
        sizes: Int[Array, "e"],
        key: MaybeKey = None,
    ) -> Float[Array, "r d"]:
        """Applies the experts to rows sorted by expert.

        Args:
            implementation: "blocked" or "ragged".
            block: number of rows of a block, see ``vmoe.routing.rows.block_size``.
            sizes: number of rows of each expert, a multiple of ``block``.
        """
        up, down, rows = reverse_only((self.up.params(), self.down.params(), rows))
        compute = implementations.ragged if implementation == "ragged" else implementations.blocked
        return compute(up, down, rows, sizes, self.hidden, key, block=block)

    def check_inputs(
        self, tokens: Float[Array, "*r d"], args: Sequence[Any], named: Mapping[str, Any]
    ) -> None:
        width = self.up.kernel.shape[1]
        if tokens.shape[-1] != width:
            raise UsageError(f"MLP experts of width {width} cannot take tokens {tokens.shape}")
        if args or named:
            names = ", ".join(sorted(named)) or "positional arguments"
            raise UsageError(f"MLP experts read tokens only: leave out {names}")


def _per_expert(
    init: nnx.Initializer, shared: bool, key: jax.Array, e: int, *shape: int
) -> Float[Array, "e ..."]:
    """The values of e experts by the initializer of one: equal ones, or independent ones."""
    if shared:
        return jnp.broadcast_to(init(key, shape, jnp.float32), (e, *shape))
    return jax.vmap(lambda own: init(own, shape, jnp.float32))(jax.random.split(key, e))
