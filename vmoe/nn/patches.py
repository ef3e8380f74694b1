"""Patch embeddings of images."""

import jax
from einops import rearrange
from flax import nnx
from jaxtyping import Array, Float

from vmoe.config import ViTConfig
from vmoe.errors import UsageError
from vmoe.nn.keys import Rngs


class Patches(nnx.Module):
    """Cuts an image into square patches and embeds each linearly (ViT, equation 1).

    Equal to a convolution with stride p and the same kernel, (p, p, 3, d).
    """

    def __init__(self, patch_size: int, width: int, *, dtype: jax.typing.DTypeLike, rngs: Rngs):
        self.patch_size = patch_size
        self.embed = nnx.LinearGeneral(
            (patch_size, patch_size, 3),
            width,
            axis=(-3, -2, -1),
            kernel_init=nnx.initializers.lecun_normal(),
            dtype=dtype,
            rngs=rngs,
        )

    def __call__(self, images: Float[Array, "b h w 3"]) -> Float[Array, "b i j d"]:
        """The embedding of each patch; height and width must be divisible by the patch size."""
        p, (h, w) = self.patch_size, images.shape[1:3]
        if h % p or w % p:
            raise UsageError(f"images of {h} x {w} pixels: patches of {p} do not divide them")
        return self.embed(rearrange(images, "b (i p) (j q) c -> b i j p q c", p=p, q=p))


def num_tokens(config: ViTConfig) -> int:
    """Tokens of an image of the config's size, the class token and registers included."""
    return (config.image_size // config.patch_size) ** 2 + config.prefix_tokens
