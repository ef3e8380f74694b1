"""The gate of Soft MoE: tokens to the logits of every slot."""

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Bool, Float

from vmoe.axes import Record
from vmoe.config import MoEConfig
from vmoe.nn.gates.linear import HIGHEST, _record
from vmoe.nn.keys import MaybeKey, Rngs
from vmoe.routing import soft


class SoftRouter(nnx.Module):
    """Parameters of the slots, kernel (d, e, c), and a scale (Soft MoE, section 2 and 2.3).

    Tokens and slots are normalised over d, so that the logits keep their size at any width.
    """

    def __init__(self, width: int, tokens: int, config: MoEConfig, *, rngs: Rngs):
        self.config = config
        shape = (width, config.num_experts, soft.capacity(config, tokens))
        self.kernel = nnx.Param(jax.random.normal(rngs.params(), shape) * width**-0.5)
        self.scale = nnx.Param(jnp.ones(()))

    def __call__(
        self, tokens: Float[Array, "g s d"], valid: Bool[Array, "g s"], key: MaybeKey = None
    ) -> Record:
        x = _normalized(tokens.astype(jnp.float32), axis=-1)
        mu = self.scale[...] * _normalized(self.kernel[...], axis=0)
        logits = jnp.einsum("gsd,dec->gsec", x, mu, precision=HIGHEST)
        return _record(logits, soft.route(logits, valid), valid, self.config)


def _normalized(x: jax.Array, axis: int) -> jax.Array:
    return x * jax.lax.rsqrt(jnp.square(x).sum(axis, keepdims=True) + 1e-6)
