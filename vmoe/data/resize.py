"""Resizes pixels with Pillow, or exactly as TensorFlow or torchvision does."""

from collections.abc import Callable

import numpy as np
from jaxtyping import Float32, Float64, Int, Num, UInt8
from PIL import Image

from vmoe.config.preprocessing import Interpolation
from vmoe.data.decode import Pixels
from vmoe.data.fast_decode import opencv

FILTERS: dict[str, tuple[float, Callable[[np.ndarray], np.ndarray]]] = {  # radius, weights
    "torch_bilinear": (1.0, lambda x: np.maximum(1 - np.abs(x), 0)),
    "torch_bicubic": (2.0, lambda x: _cubic(np.abs(x))),
    "torch_lanczos": (3.0, lambda x: np.where(np.abs(x) < 3, np.sinc(x) * np.sinc(x / 3), 0)),
}

Resized = Pixels | Float32[np.ndarray, "h w 3"]


def resize(
    pixels: UInt8[np.ndarray, "h0 w0 3"], h: int, w: int, interpolation: Interpolation
) -> Resized:
    """Resizes an image.

    Returns:
        pixels in [0, 255]: float32 for ``tf_area``, else uint8. ``tf_bilinear`` equals TensorFlow,
        ``tf_area`` equals it up to float32's rounding, and ``torch_...`` equals torchvision's
        antialiased resizing of a uint8 tensor.
    """
    if interpolation == "tf_area":
        return _area(_area(pixels, h).swapaxes(0, 1), w).swapaxes(0, 1).astype(np.float32)
    if pixels.shape[:2] == (h, w):
        return pixels
    if interpolation == "tf_bilinear":
        return _bilinear(pixels, h, w)
    if interpolation in FILTERS:
        for axis, side in ((1, w), (0, h)):
            pixels = _filtered(pixels, axis, side, *FILTERS[interpolation])
        return pixels
    resample = Image.Resampling[interpolation.upper()]
    return np.asarray(Image.fromarray(pixels).resize((w, h), resample))


def _bilinear(pixels: UInt8[np.ndarray, "h0 w0 3"], h: int, w: int) -> UInt8[np.ndarray, "h w 3"]:
    """Bilinear interpolation without antialiasing, in float32; results are truncated.

    TensorFlow interpolates along x, then along y. numpy gathers whole rows much faster than pixels,
    so the columns are rows while their neighbors are interpolated.
    """
    top, bottom, down = _neighbors(pixels.shape[0], h)
    left, right, across = _neighbors(pixels.shape[1], w)
    if len(pixels) > 2 * h:  # most rows are not used
        pixels = pixels[np.stack((top, bottom), axis=1).ravel()]
        top, bottom = np.arange(2 * h).reshape(h, 2).T
    columns = opencv().transpose(pixels)
    columns = columns.reshape(len(columns), -1)
    start, end = (columns.take(x, axis=0).astype(np.float32) for x in (left, right))
    wide = _lerp(start, end, across[:, None]).reshape(w, -1, 3)
    rows = opencv().transpose(wide).reshape(len(pixels), -1)
    start, end = (rows.take(y, axis=0) for y in (top, bottom))
    return _lerp(start, end, down[:, None]).astype(np.uint8).reshape(h, w, 3)


def _lerp(
    start: Float32[np.ndarray, "h x"], end: Float32[np.ndarray, "h x"], distance: np.ndarray
) -> Float32[np.ndarray, "h x"]:
    """``start + (end - start) * distance``, written to ``end``."""
    end -= start
    end *= distance
    end += start
    return end


def _neighbors(
    old: int, new: int
) -> tuple[Int[np.ndarray, "x"], Int[np.ndarray, "x"], Float32[np.ndarray, "x"]]:
    """For each new pixel of an axis: the old pixels before and after its center, and the distance
    from the one before, in pixels."""
    center = (np.arange(new, dtype=np.float32) + np.float32(0.5)) * (
        np.float32(old) / np.float32(new)
    ) - np.float32(0.5)
    before = np.floor(center)
    first = before.astype(int)
    return np.maximum(first, 0), np.minimum(first + 1, old - 1), center - before


def _area(values: Num[np.ndarray, "x0 y 3"], new: int) -> Float64[np.ndarray, "x y 3"]:
    """The means over ``new`` equal parts of the first axis; each value fills a unit interval."""
    old = len(values)
    cumulative = np.zeros((old + 1, *values.shape[1:]))
    np.cumsum(values, axis=0, out=cumulative[1:])
    edges = np.arange(new + 1) * (old / new)
    whole = np.minimum(edges.astype(int), old - 1)
    part = (edges - whole)[:, None, None]
    return np.diff(cumulative[whole] + part * values[whole], axis=0) * (new / old)


def _cubic(x: np.ndarray, a: float = -0.5) -> np.ndarray:
    """Keys' cubic at distances x >= 0."""
    inner = ((a + 2) * x - (a + 3)) * x * x + 1
    outer = (((x - 5) * x + 8) * x - 4) * a
    return np.where(x < 1, inner, np.where(x < 2, outer, 0))


def _filtered(
    pixels: UInt8[np.ndarray, "h w 3"],
    axis: int,
    new: int,
    radius: float,
    weights_at: Callable[[np.ndarray], np.ndarray],
) -> UInt8[np.ndarray, "h1 w1 3"]:
    """Resizes one axis as Pillow does, with weights of 16 bits instead of 22.

    Source: aten/src/ATen/native/cpu/UpSampleKernel.cpp of PyTorch 2.13, for uint8.
    """
    old = pixels.shape[axis]
    if new == old:
        return pixels
    step = old / new
    stretch = max(step, 1.0)
    center = step * (np.arange(new)[:, None] + 0.5)
    first = np.maximum((center - radius * stretch + 0.5).astype(int), 0)
    end = np.minimum((center + radius * stretch + 0.5).astype(int), old)
    index = first + np.arange((end - first).max())
    weights = np.where(index < end, weights_at((index - center + 0.5) / stretch), 0)
    weights /= weights.sum(axis=1, keepdims=True)
    bits = max(n for n in range(23) if int(0.5 + weights.max() * (1 << n)) < 1 << 15)
    whole = np.trunc(weights * (1 << bits) + np.copysign(0.5, weights)).astype(np.int32)
    shape = (-1, 1, 1) if axis == 0 else (-1, 1)
    sums = np.array(1 << (bits - 1), np.int32)
    for i, weight in zip(np.minimum(index, old - 1).T, whole.T, strict=True):
        sums = sums + pixels.take(i, axis=axis) * weight.reshape(shape)
    return np.clip(sums >> bits, 0, 255).astype(np.uint8)
