"""Pixels at a model's size, and as a model sees them."""

import numpy as np
from jaxtyping import Float, UInt8
from PIL import Image


def resize(pixels: UInt8[np.ndarray, "h0 w0 3"], size: int) -> UInt8[np.ndarray, "h w 3"]:
    """Pixels resized bilinearly to size x size, with antialiasing; the sides' ratio is not kept."""
    if pixels.shape[:2] == (size, size):
        return pixels
    return np.asarray(Image.fromarray(pixels).resize((size, size), Image.Resampling.BILINEAR))


def to_float(pixels: UInt8[np.ndarray, "*b h w 3"]) -> Float[np.ndarray, "*b h w 3"]:
    """Pixels in [0, 255] to float32 in [-1, 1]."""
    return pixels.astype(np.float32) * np.float32(2 / 255) - 1
