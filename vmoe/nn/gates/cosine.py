"""The cosine gate of X-MoE."""

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float

from vmoe.config import MoEConfig
from vmoe.config.gates import CosineGate
from vmoe.nn.gates.linear import matmul
from vmoe.nn.keys import Rngs


class Cosine(nnx.Module):
    """Cosines between projected tokens and experts, over a temperature (X-MoE, section 3.1).

    The projection to a few dimensions, and the cosine, keep tokens from collapsing around the
    experts' vectors. Parameters: ``projection`` (d, x), ``kernel`` (x, e), ``temperature``.
    """

    def __init__(self, width: int, tokens: int, config: MoEConfig, *, rngs: Rngs):
        gate, e = config.gate, config.num_experts
        assert isinstance(gate, CosineGate)
        x = gate.dim or max(1, e // 2)
        init = nnx.initializers.lecun_normal()
        self.projection = nnx.Param(init(rngs.params(), (width, x), jnp.float32))
        self.kernel = nnx.Param(init(rngs.params(), (x, e), jnp.float32))
        self.temperature = nnx.Param(jnp.full((), gate.temperature, jnp.float32))

    def __call__(self, tokens: Float[Array, "g s d"]) -> Float[Array, "g s e"]:
        projected = normalize(matmul(tokens, self.projection[...]), axis=-1)
        cosines = matmul(projected, normalize(self.kernel[...], axis=0))
        return cosines / jnp.maximum(self.temperature[...], MIN_TEMPERATURE)


MIN_TEMPERATURE = 0.01
"""The temperature is not smaller, as in Tutel's cosine gate."""


def normalize(x: jax.Array, axis: int) -> jax.Array:
    """Divides by the norm along an axis; zeros stay zeros."""
    return x * jax.lax.rsqrt(jnp.square(x).sum(axis, keepdims=True) + 1e-6)
