"""The gate of Soft MoE: logits per slot."""

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float

from vmoe.config import MoEConfig
from vmoe.nn.gates.cosine import normalize
from vmoe.nn.gates.linear import widened
from vmoe.nn.keys import Rngs


class Slots(nnx.Module):
    """Parameters of the slots, kernel (d, e, c), and a scale (Soft MoE, sections 2 and 2.3).

    Tokens and slots are normalized over d, so the scale of the logits does not depend on the width.
    """

    def __init__(self, width: int, tokens: int, config: MoEConfig, *, rngs: Rngs):
        shape = (width, config.num_experts, config.slots(tokens))
        self.kernel = nnx.Param(jax.random.normal(rngs.params(), shape, jnp.float32) * width**-0.5)
        self.scale = nnx.Param(jnp.ones((), jnp.float32))

    def __call__(self, tokens: Float[Array, "g s d"]) -> Float[Array, "g s e c"]:
        x = normalize(widened(tokens), axis=-1)
        mu = self.scale[...] * normalize(self.kernel[...], axis=0)
        return jnp.einsum("gsd,dec->gsec", x, mu, precision=jax.lax.Precision.HIGHEST)
