"""The linear gate of V-MoE: logits per expert."""

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float

from vmoe.config import MoEConfig
from vmoe.nn.keys import Rngs


class LinearGate(nnx.Module):
    """A linear layer without bias: kernel (d, e) (V-MoE, section 2.1)."""

    def __init__(self, width: int, tokens: int, config: MoEConfig, *, rngs: Rngs):
        """``tokens`` is unused."""
        init = nnx.initializers.lecun_normal()
        self.kernel = nnx.Param(init(rngs.params(), (width, config.num_experts), jnp.float32))

    def __call__(self, tokens: Float[Array, "g s d"]) -> Float[Array, "g s e"]:
        """The logits, in float32 at the highest precision."""
        highest = jax.lax.Precision.HIGHEST
        return jnp.matmul(tokens.astype(jnp.float32), self.kernel[...], precision=highest)
