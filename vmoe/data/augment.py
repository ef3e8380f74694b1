"""Random augmentation of one training image, as uint8 pixels in the model's image size."""

import numpy as np
from PIL import Image

from vmoe.config import DataConfig
from vmoe.data.decode import Pixels
from vmoe.data.erasing import cutout, erase
from vmoe.data.fast_decode import opencv
from vmoe.data.rand_augment import rand_augment


def augment(pixels: Pixels, config: DataConfig, rng: np.random.Generator) -> Pixels:
    """Applies the random changes that the config specifies, in the order of its fields."""
    if config.flip and rng.random() < 0.5:
        pixels = opencv().flip(pixels, 1)  # numpy takes 30 times as long
    if config.shift or config.rotate:
        pixels = move(pixels, config.shift, config.rotate, rng)
    layers = config.rand_augment
    pixels = rand_augment(pixels, layers.num_layers, layers.magnitude, rng)
    if config.cutout:
        pixels = cutout(pixels, config.cutout, rng)
    if config.erasing:
        pixels = erase(pixels, config.erasing, rng)
    return pixels


def move(pixels: Pixels, shift: int, rotate: float, rng: np.random.Generator) -> Pixels:
    """Rotates about the center and shifts, with bilinear interpolation; the border is black.

    Args:
        shift: largest shift along each axis, in whole pixels.
        rotate: largest angle in either direction, in degrees.
    """
    h, w, _ = pixels.shape
    angle = np.deg2rad(rng.uniform(-rotate, rotate))
    dx, dy = rng.integers(-shift, shift, size=2, endpoint=True)
    cos, sin = np.cos(angle), np.sin(angle)
    x, y = w / 2, h / 2  # output (u, v) shows input (cos u - sin v + a, sin u + cos v + b)
    a = x - cos * (x + dx) + sin * (y + dy)
    b = y - sin * (x + dx) - cos * (y + dy)
    affine = (cos, -sin, a, sin, cos, b)
    image = Image.fromarray(pixels)
    moved = image.transform((w, h), Image.Transform.AFFINE, affine, Image.Resampling.BILINEAR)
    return np.asarray(moved)
