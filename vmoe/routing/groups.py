"""Images in groups whose tokens compete for the same slots."""

import jax.numpy as jnp
from einops import rearrange, repeat
from jaxtyping import Array, Bool, Float


def group(
    tokens: Float[Array, "b n d"],
    valid: Bool[Array, "b"],
    images_per_group: int,
    devices: int = 1,
) -> tuple[Float[Array, "g s d"], Bool[Array, "g s"]]:
    """Images in groups whose tokens compete for slots, padded where they do not fill the last.

    Args:
        devices: over which the images are evenly spread; a group is of the images of one of them.

    Returns:
        the tokens of each group, and False for those that are padding.
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
    """How many groups b images form, and of how many images each: as even as possible.

    ceil(b / images_per_group) groups; where images_per_group divides b, the paper's grouping. No
    images are one group of padding.

    >>> group_sizes(20, 8)
    (3, 7)
    """
    g = max(1, -(-b // images_per_group))
    return g, max(1, -(-b // g))


def ungroup(
    groups: Float[Array, "g s d"], b: int, n: int, devices: int = 1
) -> Float[Array, "b n d"]:
    """The tokens of b images of n tokens out of their groups: ``group`` undone."""
    images = rearrange(groups, "(x g) (i n) d -> x (g i) n d", x=devices, n=n)
    return rearrange(images[:, : b // devices], "x b n d -> (x b) n d")
