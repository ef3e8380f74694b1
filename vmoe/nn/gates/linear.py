"""The linear gate of V-MoE: logits per expert."""

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float

from vmoe.config import MoEConfig
from vmoe.nn.keys import MaybeKey, Rngs


class LinearGate(nnx.Module):
    """A linear layer without bias: kernel (d, e) (V-MoE, section 2.1)."""

    def __init__(self, width: int, tokens: int, config: MoEConfig, *, rngs: Rngs):
        """``tokens`` is unused."""
        self.noise_std = config.router.noise_std
        init = nnx.initializers.lecun_normal()
        self.kernel = nnx.Param(init(rngs.params(), (width, config.num_experts), jnp.float32))

    @jax.named_scope("gate")
    def __call__(self, tokens: Float[Array, "g s d"]) -> Float[Array, "g s e"]:
        """The logits, in float32 at the highest precision."""
        highest = jax.lax.Precision.HIGHEST
        return jnp.matmul(tokens.astype(jnp.float32), self.kernel[...], precision=highest)

    def noise(self, shape: tuple[int, ...], key: MaybeKey) -> Float[Array, "g s e"] | None:
        """Noise from N(0, (noise_std / e)^2) for logits (g, s, e); None in evaluation.

        Source: V-MoE section 2.1, equation 2 (noise_std = 1).
        """
        if key is None or self.noise_std == 0:
            return None
        return jax.random.normal(key, shape) * (self.noise_std / shape[-1])
