"""Resizing of pixels, by Pillow or exactly as TensorFlow does."""

import numpy as np
from jaxtyping import Float32, Float64, Int, Num, UInt8
from PIL import Image

from vmoe.config.preprocessing import Interpolation

Pixels = UInt8[np.ndarray, "h w 3"] | Float32[np.ndarray, "h w 3"]


def resize(
    pixels: UInt8[np.ndarray, "h0 w0 3"], h: int, w: int, interpolation: Interpolation
) -> Pixels:
    """Resizes an image.

    Args:
        pixels: in [0, 255].
        h: height of the result, in pixels.
        w: width of the result, in pixels.

    Returns:
        pixels in [0, 255]: float32 for ``tf_area``, else uint8. They equal those of TensorFlow for
        ``tf_bilinear``, and up to float32's rounding for ``tf_area``.
    """
    if interpolation == "tf_area":
        return _area(_area(pixels, h).swapaxes(0, 1), w).swapaxes(0, 1).astype(np.float32)
    if pixels.shape[:2] == (h, w):
        return pixels
    if interpolation == "tf_bilinear":
        return _bilinear(pixels, h, w)
    resample = Image.Resampling[interpolation.upper()]
    return np.asarray(Image.fromarray(pixels).resize((w, h), resample))


def _bilinear(pixels: UInt8[np.ndarray, "h0 w0 3"], h: int, w: int) -> UInt8[np.ndarray, "h w 3"]:
    """Bilinear interpolation without antialiasing, in float32; fractions are cut off.

    TensorFlow interpolates along x, then along y. numpy gathers single bytes and whole rows much
    faster than pixels, so each row is an array of bytes here.
    """
    top, bottom, down = _neighbours(pixels.shape[0], h)
    left, right, across = _neighbours(pixels.shape[1], w)
    rows = pixels.reshape(len(pixels), -1)
    channels = np.arange(3)
    starts, ends = ((3 * x[:, None] + channels).ravel() for x in (left, right))

    def resized(y: Int[np.ndarray, "h"]) -> Float32[np.ndarray, "h x"]:
        chosen = rows.take(y, axis=0)
        start, end = (chosen.take(x, axis=1).astype(np.float32) for x in (starts, ends))
        return _lerp(start, end, across.repeat(3))

    return _lerp(resized(top), resized(bottom), down[:, None]).astype(np.uint8).reshape(h, w, 3)


def _lerp(
    start: Float32[np.ndarray, "h x"], end: Float32[np.ndarray, "h x"], distance: np.ndarray
) -> Float32[np.ndarray, "h x"]:
    """``start + (end - start) * distance``, in place of ``end``."""
    end -= start
    end *= distance
    end += start
    return end


def _neighbours(
    old: int, new: int
) -> tuple[Int[np.ndarray, "x"], Int[np.ndarray, "x"], Float32[np.ndarray, "x"]]:
    """For each new pixel of an axis: the old ones before and after its centre, and the distance
    from the former, in pixels."""
    centre = (np.arange(new, dtype=np.float32) + np.float32(0.5)) * (
        np.float32(old) / np.float32(new)
    ) - np.float32(0.5)
    before = np.floor(centre)
    first = before.astype(int)
    return np.maximum(first, 0), np.minimum(first + 1, old - 1), centre - before


def _area(values: Num[np.ndarray, "x0 y 3"], new: int) -> Float64[np.ndarray, "x y 3"]:
    """The means over ``new`` equal parts of the first axis; each value fills a unit interval."""
    old = len(values)
    cumulative = np.zeros((old + 1, *values.shape[1:]))
    np.cumsum(values, axis=0, out=cumulative[1:])
    edges = np.arange(new + 1) * (old / new)
    whole = np.minimum(edges.astype(int), old - 1)
    part = (edges - whole)[:, None, None]
    return np.diff(cumulative[whole] + part * values[whole], axis=0) * (new / old)
