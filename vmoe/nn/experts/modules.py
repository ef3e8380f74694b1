"""Modules for experts other than MLPs."""

import math

import jax
import jax.numpy as jnp
from einops import rearrange
from flax import nnx
from jaxtyping import Array, Bool, Float, Int

from vmoe.errors import UsageError
from vmoe.nn import attention, mlp
from vmoe.nn.keys import Rngs
from vmoe.routing.indexing import rows_at


class Identity(nnx.Module):
    """Returns its tokens."""

    def __call__(self, tokens: Float[Array, "*b d"]) -> Float[Array, "*b d"]:
        return tokens


class Zero(nnx.Module):
    """Returns zeros."""

    def __call__(self, tokens: Float[Array, "*b d"]) -> Float[Array, "*b d"]:
        return jnp.zeros_like(tokens)


class Constant(nnx.Module):
    """a1 x + a2 v for a token x, a learned vector v and (a1, a2) = softmax(x W).

    Parameters: ``mix`` kernel (d, 2) is W, ``vector`` (d) is v, zeros at first.

    Source: MoE++, equation 5 (arXiv 2410.07348).
    """

    def __init__(self, width: int, *, dtype: jax.typing.DTypeLike | None, rngs: Rngs):
        keys = nnx.Rngs(rngs.params())
        self.mix = nnx.Linear(width, 2, use_bias=False, dtype=dtype, rngs=keys)
        self.vector = nnx.Param(jnp.zeros(width))

    def __call__(self, tokens: Float[Array, "*b d"]) -> Float[Array, "*b d"]:
        shares = nnx.softmax(self.mix(tokens), axis=-1)
        return shares[..., :1] * tokens + shares[..., 1:] * self.vector[...].astype(tokens.dtype)


class Cnn(nnx.Module):
    """A depthwise convolution over the patch grid and a linear layer, with GELU between them.

    To the convolution, patches outside the expert's slots are zeros. A class token has no
    neighbors. Parameters: ``depthwise`` kernel (x, x, 1, d), ``pointwise`` kernel (d, d), biases.
    """

    takes = ("filled", "images", "positions", "n", "s")

    def __init__(
        self, width: int, kernel_size: int, *, dtype: jax.typing.DTypeLike | None, rngs: Rngs
    ):
        keys, size = nnx.Rngs(rngs.params()), (kernel_size, kernel_size)
        self.depthwise = nnx.Conv(
            width, width, size, feature_group_count=width, dtype=dtype, rngs=keys
        )
        self.pointwise = nnx.Linear(
            width, width, kernel_init=mlp.kernel_init, dtype=dtype, rngs=keys
        )

    def __call__(
        self,
        tokens: Float[Array, "g c d"],
        *,
        filled: Bool[Array, "g c"],
        images: Int[Array, "g c"],
        positions: Int[Array, "g c"],
        n: int,
        s: int,
    ) -> Float[Array, "g c d"]:
        """The outputs for the tokens in the slots."""
        side = math.isqrt(n)
        first = n - side**2  # 1 with a class token
        if first > 1:
            raise UsageError(
                f"a cnn expert needs a square grid of patches, and an image has {n} tokens: use "
                "square images, or other experts"
            )
        if s % n:
            raise UsageError(
                f"a cnn expert needs whole images, and a group has {s} of the {n} tokens of one: "
                "use larger groups, or other experts"
            )
        index = jnp.where(filled, images * n + positions, s)  # g c
        scatter = jax.vmap(
            lambda x, i: jnp.zeros((s, x.shape[-1]), x.dtype).at[i].set(x, mode="drop")
        )
        by_image = rearrange(scatter(tokens, index), "g (x n) d -> (g x) n d", n=n)
        grid = rearrange(by_image[:, first:], "x (i j) d -> x i j d", i=side)
        convolved = rearrange(self.depthwise(grid), "x i j d -> x (i j) d")
        if first:
            alone = self.depthwise(by_image[:, :1, None])[:, 0]  # x 1 d
            convolved = jnp.concatenate([alone, convolved], axis=1)
        by_group = rearrange(convolved, "(g x) n d -> g (x n) d", g=len(tokens))
        return self.pointwise(nnx.gelu(rows_at(by_group, index)))


class Attention(nnx.Module):
    """Self-attention among the tokens of an image that are in the expert's slots.

    Parameters: ``attention``, as in a block of the ViT.
    """

    takes = ("filled", "images")

    def __init__(
        self, width: int, num_heads: int, *, dtype: jax.typing.DTypeLike | None, rngs: Rngs
    ):
        keys = nnx.Rngs(rngs.params())
        self.attention = attention.Attention(width, num_heads, dtype=dtype, rngs=keys)

    def __call__(
        self,
        tokens: Float[Array, "g c d"],
        *,
        filled: Bool[Array, "g c"],
        images: Int[Array, "g c"],
    ) -> Float[Array, "g c d"]:
        """The outputs for the tokens in the slots; in empty slots they have no meaning."""
        together = (images[:, :, None] == images[:, None]) & filled[:, None]  # g q c
        return self.attention(tokens, mask=together[:, None])
