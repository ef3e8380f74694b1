"""Converts decoded pixels to the size and the range of values of a model's input."""

import io
from collections.abc import Iterator

import numpy as np
from jaxtyping import Float, UInt8
from PIL import Image

from vmoe.data.sources.source import Source, sampled
from vmoe.errors import UsageError

EXTREME = 4  # ratio of sides from which a change of size is reported


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


def resizing_messages(source: Source, size: int) -> Iterator[str]:
    """A line if some of a sample of images are enlarged or shrunk more than fourfold.

    Args:
        size: side of the square to which the images are resized, in pixels.
    """
    sides = [_sides(source, i) for i in sampled(len(source))]
    for change, found in {
        "enlarged": [each for each in sides if 0 < EXTREME * max(each[1:]) < size],
        "shrunk": [each for each in sides if max(each[1:]) > EXTREME * size],
    }.items():
        if found:
            origin, h, w = found[0]
            yield (
                f"{len(found)} of {len(sides)} sampled images are {change} more than fourfold to "
                f"{size} px, such as {origin} ({w} x {h})"
            )


def _sides(source: Source, index: int) -> tuple[str, int, int]:
    """Origin, height and width in pixels of an image; zeros if it cannot be read."""
    try:
        example = source[index]
        if not isinstance(example.image, bytes):
            return example.origin, example.image.shape[0], example.image.shape[1]
        with Image.open(io.BytesIO(example.image)) as image:
            return example.origin, image.height, image.width
    except (UsageError, OSError, ValueError, SyntaxError, Image.DecompressionBombError):
        return "", 0, 0
