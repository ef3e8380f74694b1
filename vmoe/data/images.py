"""Image files to pixels, and pixels to what a model sees."""

from pathlib import Path

import numpy as np
from jaxtyping import Float, UInt8
from PIL import Image, UnidentifiedImageError

from vmoe.config import UsageError


def read_image(path: str | Path, size: int) -> UInt8[np.ndarray, "h w 3"]:
    """An image file as RGB pixels in [0, 255], resized bilinearly to size x size.

    Raises:
        UsageError: there is no such file, or it is not an image.
    """
    try:
        with Image.open(path) as image:
            rgb = image.convert("RGB")
    except FileNotFoundError:
        raise UsageError(f"{path}: no such file") from None
    except (UnidentifiedImageError, OSError) as error:
        raise UsageError(f"{path}: cannot be read as an image ({error})") from None
    if rgb.size != (size, size):
        rgb = rgb.resize((size, size), Image.Resampling.BILINEAR)
    return np.asarray(rgb)


def to_float(pixels: UInt8[np.ndarray, "*b h w 3"]) -> Float[np.ndarray, "*b h w 3"]:
    """Pixels in [0, 255] to float32 in [-1, 1]."""
    return pixels.astype(np.float32) * np.float32(2 / 255) - 1
