"""Layer norms of a model."""

import jax.numpy as jnp
from flax import nnx

from vmoe.config import ViTConfig
from vmoe.nn.keys import Rngs


def layer_norm(config: ViTConfig, *, rngs: Rngs) -> nnx.LayerNorm:
    """A layer norm over the width of the tokens, with the config's epsilon and dtype."""
    dtype = jnp.dtype(config.dtype)
    return nnx.LayerNorm(config.width, epsilon=config.norm_epsilon, dtype=dtype, rngs=rngs)
