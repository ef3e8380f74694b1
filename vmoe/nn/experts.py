"""The experts of a sparse layer: as many MLPs, their parameters stacked along e."""

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float

from vmoe.nn import keys, mlp
from vmoe.nn.keys import MaybeKey, Rngs


class Experts(nnx.Module):
    """e MLPs side by side, each on its own slots.

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
        dtype: jax.typing.DTypeLike,
        rngs: Rngs,
    ):
        def linear(inputs: int, outputs: int) -> nnx.Einsum:
            return nnx.Einsum(
                "gecx,exy->gecy",
                (experts, inputs, outputs),
                (experts, outputs),
                kernel_init=_per_expert(mlp.kernel_init, shared_init),
                bias_init=_per_expert(mlp.bias_init, shared_init),
                dtype=dtype,
                rngs=rngs,
            )

        self.up = linear(width, hidden)
        self.down = linear(hidden, width)
        self.dropout = nnx.Dropout(dropout)

    def __call__(
        self, slots: Float[Array, "g e c d"], key: MaybeKey = None
    ) -> Float[Array, "g e c d"]:
        inner, outer = keys.split(key, 2)
        hidden = nnx.gelu(self.up(slots), approximate=True)
        hidden = self.dropout(hidden, deterministic=key is None, rngs=inner)
        return self.dropout(self.down(hidden), deterministic=key is None, rngs=outer)


def _per_expert(init: nnx.Initializer, shared: bool) -> nnx.Initializer:
    """An initialiser of all experts from that of one: one draw for all, or one draw each."""

    def draw(key: jax.Array, shape: tuple[int, ...], dtype: jax.typing.DTypeLike) -> jax.Array:
        e, *one = shape
        if shared:
            return jnp.broadcast_to(init(key, one, dtype), shape)
        return jax.vmap(lambda k: init(k, one, dtype))(jax.random.split(key, e))

    return draw
