"""The dense MLP of a transformer block."""

import jax
from flax import nnx
from jaxtyping import Array, Float

from vmoe.nn import keys
from vmoe.nn.keys import MaybeKey, Rngs

kernel_init = nnx.initializers.xavier_uniform()
bias_init = nnx.initializers.normal(1e-6)


class Mlp(nnx.Module):
    """down(GELU(up(x))), with dropout after each of the two (ViT, equation 3; tanh GELU)."""

    def __init__(
        self,
        width: int,
        mlp_dim: int,
        *,
        dropout: float = 0.0,
        dtype: jax.typing.DTypeLike,
        rngs: Rngs,
    ):
        init = dict(kernel_init=kernel_init, bias_init=bias_init, dtype=dtype, rngs=rngs)
        self.up = nnx.Linear(width, mlp_dim, **init)
        self.down = nnx.Linear(mlp_dim, width, **init)
        self.dropout = nnx.Dropout(dropout)

    def __call__(self, x: Float[Array, "*b d"], key: MaybeKey = None) -> Float[Array, "*b d"]:
        inner, outer = keys.split(key, 2)
        hidden = nnx.gelu(self.up(x), approximate=True)
        hidden = self.dropout(hidden, deterministic=key is None, rngs=inner)
        return self.dropout(self.down(hidden), deterministic=key is None, rngs=outer)
