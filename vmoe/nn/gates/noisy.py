"""A linear gate with noise whose standard deviation is learned."""

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float

from vmoe.config import MoEConfig
from vmoe.nn.gates.interface import NoisyLogits
from vmoe.nn.gates.linear import matmul
from vmoe.nn.keys import Rngs


class Noisy(nnx.Module):
    """Two linear layers without bias: kernel (d, e) for the logits, noise (d, e) for their noise.

    Both start at zero, so that all experts get the same load at first (Shazeer et al. 2017,
    section 2.1 and appendix A). As in the paper's code, the standard deviation is at least
    ``MIN_NOISE_STD``: the load loss divides by it.
    """

    def __init__(self, width: int, tokens: int, config: MoEConfig, *, rngs: Rngs):
        self.kernel = nnx.Param(jnp.zeros((width, config.num_experts), jnp.float32))
        self.noise = nnx.Param(jnp.zeros((width, config.num_experts), jnp.float32))

    def __call__(self, tokens: Float[Array, "g s d"]) -> NoisyLogits:
        """The logits, and the standard deviation of their noise.

        It is softplus(tokens @ noise) + ``MIN_NOISE_STD``.
        """
        noise_std = jax.nn.softplus(matmul(tokens, self.noise[...])) + MIN_NOISE_STD
        return NoisyLogits(matmul(tokens, self.kernel[...]), noise_std)


MIN_NOISE_STD = 0.01
"""Added to the learned standard deviation."""
