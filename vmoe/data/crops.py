"""Converts decoded pixels to the size and the range of values of a model's input."""

import numpy as np
from jaxtyping import Float, UInt8
from PIL import Image


def resize(pixels: UInt8[np.ndarray, "h0 w0 3"], size: int) -> UInt8[np.ndarray, "h w 3"]:
    """Resizes the whole image to a square, bilinearly and with antialiasing.

    The aspect ratio is not kept.

    Args:
        pixels: in [0, 255].
        size: side of the square, in pixels.
    """
    if pixels.shape[:2] == (size, size):
        return pixels
    return np.asarray(Image.fromarray(pixels).resize((size, size), Image.Resampling.BILINEAR))


def to_float(pixels: UInt8[np.ndarray, "*b h w 3"]) -> Float[np.ndarray, "*b h w 3"]:
    """Converts pixels in [0, 255] to float32 in [-1, 1]."""
    return pixels.astype(np.float32) * np.float32(2 / 255) - 1
