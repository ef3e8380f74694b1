"""Attention pooling, from an image's tokens to one vector, and the head, from it to logits."""

import jax
import jax.numpy as jnp
from einops import repeat
from flax import nnx
from jaxtyping import Array, Float

from vmoe.config import ViTConfig
from vmoe.nn.attention import Attention
from vmoe.nn.keys import Rngs
from vmoe.nn.mlp import Hidden, Mlp, make_norm


class AttentionPool(nnx.Module):
    """A learned probe attends to the tokens, then an MLP ("Scaling Vision Transformers", 3.2)."""

    def __init__(self, config: ViTConfig, *, dtype: jax.typing.DTypeLike, rngs: Rngs):
        width, num_heads = config.width, config.num_heads
        init = nnx.initializers.xavier_uniform()
        self.probe = nnx.Param(init(rngs.params(), (1, 1, width), jnp.float32))
        self.attention = Attention(
            width,
            num_heads,
            qk_norm=config.qk_norm,
            qk_rms=config.qk_rms,
            dtype=dtype,
            rngs=rngs,
        )
        self.norm = make_norm(config, rngs=rngs)
        hidden = Hidden(config.activation)
        self.mlp = Mlp(width, config.mlp_dim, hidden=hidden, dtype=dtype, rngs=rngs)

    def __call__(self, tokens: Float[Array, "b n d"]) -> Float[Array, "b d"]:
        probe = repeat(self.probe[...].astype(tokens.dtype), "1 1 d -> b 1 d", b=len(tokens))
        pooled = self.attention(probe, tokens)
        return (pooled + self.mlp(self.norm(pooled)))[:, 0]


class Head(nnx.Module):
    """An optional dense layer with tanh, then a linear layer to the logits, in float32.

    Without classes there is no linear layer, and the features are returned.
    """

    def __init__(self, config: ViTConfig, *, dtype: jax.typing.DTypeLike, rngs: Rngs):
        width = config.pre_logits or config.width
        self.pre_logits = (
            nnx.Linear(config.width, width, dtype=dtype, rngs=rngs) if config.pre_logits else None
        )
        self.classes = (
            nnx.Linear(
                width,
                config.num_classes,
                kernel_init=nnx.initializers.normal(config.head_std),
                bias_init=nnx.initializers.constant(config.head_bias),
                dtype=jnp.float32,
                rngs=rngs,
            )
            if config.num_classes
            else None
        )

    def features(self, pooled: Float[Array, "b d"]) -> Float[Array, "b r"]:
        """Inputs of the last linear layer: the pre-logits, if any."""
        return pooled if self.pre_logits is None else jnp.tanh(self.pre_logits(pooled))

    @jax.named_scope("head")
    def __call__(self, pooled: Float[Array, "b d"]) -> Float[Array, "b y"]:
        features = self.features(pooled)
        return features.astype(jnp.float32) if self.classes is None else self.classes(features)
