"""Random changes of one training image, on its uint8 pixels."""

import numpy as np
from jaxtyping import UInt8
from PIL import Image

from vmoe.config import Data


def augment(
    pixels: UInt8[np.ndarray, "h w 3"], config: Data, rng: np.random.Generator
) -> UInt8[np.ndarray, "h w 3"]:
    """Rotated about its centre by up to ``rotate`` degrees and shifted by whole pixels.

    Bilinear; what comes in from outside is black.
    """
    if not config.shift and not config.rotate:
        return pixels
    h, w, _ = pixels.shape
    angle = np.deg2rad(rng.uniform(-config.rotate, config.rotate))
    dx, dy = rng.integers(-config.shift, config.shift, size=2, endpoint=True)
    cos, sin = np.cos(angle), np.sin(angle)
    x, y = w / 2, h / 2  # output (u, v) shows input (cos u - sin v + a, sin u + cos v + b)
    a = x - cos * (x + dx) + sin * (y + dy)
    b = y - sin * (x + dx) - cos * (y + dy)
    affine = (cos, -sin, a, sin, cos, b)
    image = Image.fromarray(pixels)
    moved = image.transform((w, h), Image.Transform.AFFINE, affine, Image.Resampling.BILINEAR)
    return np.asarray(moved)
