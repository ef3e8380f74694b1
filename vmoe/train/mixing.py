"""Mixup and CutMix of the images of one batch, on the device."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float32, Key

from vmoe.config import DataConfig
from vmoe.errors import UsageError


@jax.named_scope("mixing")
def mix(
    images: Float32[Array, "b h w 3"],
    targets: Float32[Array, "b y"],
    key: Key[Array, ""],
    config: DataConfig,
    devices: int = 1,
    replicate: Callable[[Any], Any] = lambda draws: draws,
) -> tuple[Float32[Array, "b h w 3"], Float32[Array, "b y"]]:
    """Mixes each image with the next one on its device, and their targets with the same weights.

    Mixup draws two weights from Dirichlet(mixup, mixup) and gives the larger one to the image
    itself. CutMix draws the image's share of the area from Beta(cutmix, cutmix) and fills a box
    with the pixels of the next one; its center is uniform, it is clipped at the edges, and the
    targets have the weights of the areas that result. If a config has both, one of the two is drawn
    for the step, each with probability 1/2.

    Args:
        images: in [-1, 1].
        targets: see ``label_vectors``.
        key: random key of the step.
        config: ``mixup`` and ``cutmix``, 0 for none; ``mixing``: draw once per device, or per
            image.
        devices: the number of equal parts of the batch, which are mixed separately.
        replicate: ``Placement.replicate`` on a mesh; else the draws are split over the devices,
            which costs collectives.

    Raises:
        UsageError: there is one image per device, so no other to mix it with.

    Source: "mixup: Beyond Empirical Risk Minimization" (arXiv 1710.09412, section 2), where giving
    the larger weight to the image follows V-MoE's code; "CutMix" (arXiv 1905.04899, section 3.1).
    """
    if not (config.mixup or config.cutmix):
        return images, targets
    b, h, w, _ = images.shape
    if b == devices:
        raise UsageError(
            "a device has one image, and no other to mix it with; use 0 for both, or a larger "
            "batch_size",
            **{"data.mixup": config.mixup, "data.cutmix": config.cutmix},
        )
    shape = devices, 1 if config.mixing == "device" else b // devices
    is_cutmix, share, center = replicate(_draw(key, shape, config))
    weights = jnp.maximum(share, 1 - share)[..., None, None]
    if config.cutmix:
        weights = jnp.where(is_cutmix, _outside_box(share, center, h, w), weights)
    areas = weights.mean(axis=(2, 3))
    return mix_with_next(images, weights[..., None]), mix_with_next(targets, areas[..., None])


def mix_with_next(x: Float32[Array, "b *x"], weights: Float32[Array, "_ _ *_"]) -> Array:
    """The weighted mean of each row and the next one on its device, the last and the first.

    Args:
        x: rows of all devices.
        weights: weights of the rows themselves, in [0, 1]: by device; then by row of the device, or
            1; further axes as in x, or 1.
    """
    rows = x.reshape(weights.shape[0], -1, *x.shape[1:])
    return (weights * rows + (1 - weights) * jnp.roll(rows, -1, axis=1)).reshape(x.shape)


def _draw(
    key: Key[Array, ""], shape: tuple[int, int], config: DataConfig
) -> tuple[Bool[Array, ""], Float32[Array, "x r"], Float32[Array, "x r 2"]]:
    """Whether to use CutMix; the weights, and the centers of the boxes as shares of the sides."""
    choice, pair, center = jax.random.split(key, 3)
    is_cutmix = jnp.asarray(bool(config.cutmix))
    if config.mixup and config.cutmix:
        is_cutmix = jax.random.bernoulli(choice)
    concentration = jnp.where(is_cutmix, config.cutmix, config.mixup)
    pairs = jax.random.dirichlet(pair, jnp.stack([concentration, concentration]), shape)
    return is_cutmix, pairs[..., 0], jax.random.uniform(center, (*shape, 2))


def _outside_box(
    share: Float32[Array, "x r"], center: Float32[Array, "x r 2"], h: int, w: int
) -> Float32[Array, "x r h w"]:
    """1 outside a box that has the rest of the area, 0 inside."""
    side = jnp.sqrt(1 - share)

    def inside(axis: int, length: int) -> Bool[Array, "x r n"]:
        """Whether each pixel of an axis is in the box."""
        size = (side * length).astype(int)[..., None]
        start = (center[..., axis] * length).astype(int)[..., None] - size // 2
        pixels = jnp.arange(length)
        return (start <= pixels) & (pixels < start + size)

    box = inside(0, h)[..., :, None] & inside(1, w)[..., None, :]
    return 1 - box.astype(jnp.float32)
