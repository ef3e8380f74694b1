"""The norms and the dense MLP of a block, and what that MLP shares with the experts."""

import functools
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float

from vmoe.config import ViTConfig
from vmoe.config.experts import Activation
from vmoe.nn import keys
from vmoe.nn.keys import MaybeKey, Rngs

kernel_init = nnx.initializers.xavier_uniform()
bias_init = nnx.initializers.normal(1e-6)

ACTIVATIONS: dict[Activation, Callable[[jax.Array], jax.Array]] = {
    "gelu_tanh": functools.partial(nnx.gelu, approximate=True),
    "gelu": functools.partial(nnx.gelu, approximate=False),
    "quick_gelu": lambda x: x * nnx.sigmoid(1.702 * x),
    "relu": nnx.relu,
    "silu": nnx.silu,
}


class Hidden(NamedTuple):
    """An MLP without its two linear layers: the activation and dropout.

    Attributes:
        activation: the activation.
        dropout: dropout rate, after the activation and after the second layer.
        gated: whether the first layer has twice the hidden width: its first half, after the
            activation, multiplies its second half (arXiv 2002.05202).
    """

    activation: Activation = "gelu_tanh"
    dropout: float = 0.0
    gated: bool = False

    def __call__(
        self,
        hidden: Float[Array, "*b x"],
        down: Callable[[jax.Array], jax.Array],
        key: MaybeKey = None,
    ) -> Float[Array, "*b d"]:
        """down(activation(hidden)), with dropout after each of the two (ViT, equation 3)."""
        dropout = nnx.Dropout(self.dropout)
        inner, outer = keys.split(key, 2)
        activation = ACTIVATIONS[self.activation]
        if self.gated:
            gate, hidden = jnp.split(hidden, 2, axis=-1)
            hidden = activation(gate) * hidden
        else:
            hidden = activation(hidden)
        hidden = dropout(hidden, deterministic=key is None, rngs=inner)
        return dropout(down(hidden), deterministic=key is None, rngs=outer)


TANH = Hidden()


def make_norm(
    config: ViTConfig, width: int | None = None, *, rngs: Rngs
) -> nnx.LayerNorm | nnx.RMSNorm:
    """A norm over the width of the tokens, or another one, with the config's epsilon and dtype."""
    norm = nnx.LayerNorm if config.norm == "layer" else nnx.RMSNorm
    dtype = jnp.dtype(config.dtype)
    return norm(width or config.width, epsilon=config.norm_epsilon, dtype=dtype, rngs=rngs)


class Mlp(nnx.Module):
    """Two linear layers, ``up`` and ``down``, with an activation and maybe a norm between them."""

    def __init__(
        self,
        width: int,
        mlp_dim: int,
        *,
        hidden: Hidden = TANH,
        norm: nnx.Module | None = None,
        dtype: jax.typing.DTypeLike | None = None,
        rngs: Rngs,
    ):
        init = dict(kernel_init=kernel_init, bias_init=bias_init, dtype=dtype, rngs=rngs)
        self.up = nnx.Linear(width, 2 * mlp_dim if hidden.gated else mlp_dim, **init)
        self.down = nnx.Linear(mlp_dim, width, **init)
        self.hidden = hidden
        self.norm = norm

    @jax.named_scope("mlp")
    def __call__(self, x: Float[Array, "*b d"], key: MaybeKey = None) -> Float[Array, "*b d"]:
        if self.norm is None:
            return self.hidden(self.up(x), self.down, key)
        return self.hidden(self.up(x), lambda hidden: self.down(self.norm(hidden)), key)
