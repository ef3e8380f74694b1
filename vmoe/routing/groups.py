"""Groups of images, whose tokens compete for the same slots."""

import jax.numpy as jnp
from einops import rearrange, repeat
from jaxtyping import Array, Bool, Shaped


def group(
    tokens: Shaped[Array, "b n d"],
    valid: Bool[Array, "b"],
    images_per_group: int,
    devices: int = 1,
) -> tuple[Shaped[Array, "g s d"], Bool[Array, "g s"]]:
    """The tokens of images by group; padding fills the last group.

    Args:
        valid: False for images that only pad the batch.
        devices: number of devices, each with an equal share of the images; all images of a group
            are on one device.

    Returns:
        the tokens of each group, and a mask that is False for padding.
    """
    b, n, _ = tokens.shape
    g, i = group_sizes(b // devices, images_per_group)
    missing = g * i - b // devices
    tokens = rearrange(tokens, "(x b) n d -> x b n d", x=devices)
    valid = rearrange(valid, "(x b) -> x b", x=devices)
    tokens = jnp.pad(tokens, ((0, 0), (0, missing), (0, 0), (0, 0)))
    valid = jnp.pad(valid, ((0, 0), (0, missing)))
    return (
        rearrange(tokens, "x (g i) n d -> (x g) (i n) d", g=g),
        repeat(valid, "x (g i) -> (x g) (i n)", g=g, n=n),
    )


def group_sizes(b: int, images_per_group: int) -> tuple[int, int]:
    """The number of groups for b images and the images in each, as even as possible.

    There are ceil(b / images_per_group) groups. If images_per_group divides b, each has exactly
    that many images, as in the paper. Without images there is one group of padding.

    >>> group_sizes(20, 8)
    (3, 7)
    """
    g = max(1, -(-b // images_per_group))
    return g, images_in_group(b, g)


def images_in_group(b: int, g: int) -> int:
    """The number of images, padding included, in each of the g groups of b images.

    >>> images_in_group(20, 3)
    7
    """
    return max(1, -(-b // g))


def ungroup(
    groups: Shaped[Array, "g s x"], b: int, n: int, devices: int = 1
) -> Shaped[Array, "b n x"]:
    """The tokens of b images with n tokens each, from their groups: the inverse of ``group``."""
    images = rearrange(groups, "(x g) (i n) d -> x (g i) n d", x=devices, n=n)
    return rearrange(images[:, : b // devices], "x b n d -> (x b) n d")
