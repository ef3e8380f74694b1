"""The experts of a sparse layer: as many MLPs, their parameters stacked along e."""

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, Int

from vmoe.nn import implementations, mlp
from vmoe.nn.implementations import ExpertLinearParams
from vmoe.nn.keys import MaybeKey, Rngs


class ExpertLinear(nnx.Module):
    """A linear layer of each expert: kernel (e, x, y), bias (e, y)."""

    def __init__(self, experts: int, x: int, y: int, *, shared_init: bool, rngs: Rngs):
        kernel = _per_expert(mlp.kernel_init, shared_init)
        bias = _per_expert(mlp.bias_init, shared_init)
        self.kernel = nnx.Param(kernel(rngs.params(), (experts, x, y), jnp.float32))
        self.bias = nnx.Param(bias(rngs.params(), (experts, y), jnp.float32))

    def linears(self) -> ExpertLinearParams:
        """The parameters alone."""
        return ExpertLinearParams(self.kernel[...], self.bias[...])


class Experts(nnx.Module):
    """e MLPs side by side, each on rows of its own.

    Parameters: ``up`` kernel (e, d, f) and bias (e, f), ``down`` kernel (e, f, d), bias (e, d).
    """

    def __init__(
        self,
        experts: int,
        width: int,
        hidden: int,
        *,
        dropout: float = 0.0,
        shared_init: bool = True,
        rngs: Rngs,
    ):
        self.up = ExpertLinear(experts, width, hidden, shared_init=shared_init, rngs=rngs)
        self.down = ExpertLinear(experts, hidden, width, shared_init=shared_init, rngs=rngs)
        self.rate = dropout

    def __call__(
        self, slots: Float[Array, "g e c d"], key: MaybeKey = None
    ) -> Float[Array, "g e c d"]:
        """On slots of fixed capacity."""
        return implementations.batched(
            self.up.linears(), self.down.linears(), slots, self.rate, key
        )

    def on_rows(
        self,
        rows: Float[Array, "r d"],
        sizes: Int[Array, "e"],
        key: MaybeKey = None,
        *,
        block: int | None,
    ) -> Float[Array, "r d"]:
        """On rows sorted by expert, as many for each as ``sizes`` says.

        Args:
            block: rows of a block, by which sizes are divided; None for one ragged product.
        """
        mlps = self.up.linears(), self.down.linears(), rows, sizes, self.rate, key
        return (
            implementations.ragged(*mlps)
            if block is None
            else implementations.blocked(*mlps, block=block)
        )


def _per_expert(init: nnx.Initializer, shared: bool) -> nnx.Initializer:
    """An initialiser of all experts from that of one: one draw for all, or one draw each."""

    def draw(key: jax.Array, shape: tuple[int, ...], dtype: jax.typing.DTypeLike) -> jax.Array:
        e, *one = shape
        if shared:
            return jnp.broadcast_to(init(key, one, dtype), shape)
        return jax.vmap(lambda k: init(k, one, dtype))(jax.random.split(key, e))

    return draw
