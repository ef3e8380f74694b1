"""A gate with a hidden layer."""

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float

from vmoe.config import MoEConfig
from vmoe.config.gates import MlpGate
from vmoe.nn.gates.linear import matmul
from vmoe.nn.keys import Rngs


class Mlp(nnx.Module):
    """Two linear layers with tanh between them: hidden (d, x), bias (x), kernel (x, e)."""

    def __init__(self, width: int, tokens: int, config: MoEConfig, *, rngs: Rngs):
        assert isinstance(config.gate, MlpGate)
        x, init = config.gate.hidden_dim or width, nnx.initializers.lecun_normal()
        self.hidden = nnx.Param(init(rngs.params(), (width, x), jnp.float32))
        self.bias = nnx.Param(jnp.zeros(x, jnp.float32))
        self.kernel = nnx.Param(init(rngs.params(), (x, config.num_experts), jnp.float32))

    def __call__(self, tokens: Float[Array, "g s d"]) -> Float[Array, "g s e"]:
        hidden = jax.nn.tanh(matmul(tokens, self.hidden[...]) + self.bias[...])
        return matmul(hidden, self.kernel[...])
