"""The linear gate of V-MoE."""

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float

from vmoe.config import MoEConfig
from vmoe.nn.inputs import as_tokens
from vmoe.nn.keys import Rngs


class Linear(nnx.Module):
    """A linear layer without bias: kernel (d, e) (V-MoE, section 2.1)."""

    def __init__(self, width: int, tokens: int, config: MoEConfig, *, rngs: Rngs):
        init = nnx.initializers.lecun_normal()
        self.kernel = nnx.Param(init(rngs.params(), (width, config.num_experts), jnp.float32))

    def __call__(self, tokens: Float[Array, "g s d"]) -> Float[Array, "g s e"]:
        return matmul(tokens, self.kernel[...])


def matmul(tokens: Float[Array, "g s d"], kernel: Float[Array, "d x"]) -> Float[Array, "g s x"]:
    """The product in float32 or more, at the highest precision: small errors change choices."""
    return jnp.matmul(widened(tokens), kernel, precision=jax.lax.Precision.HIGHEST)


def widened(tokens: Float[Array, "g s d"]) -> Float[Array, "g s d"]:
    """Tokens in float32 or more."""
    tokens = as_tokens(tokens)
    return tokens.astype(jnp.result_type(tokens, jnp.float32))
