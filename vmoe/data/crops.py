"""Converts decoded pixels to the size of a model's input."""

import io
from collections.abc import Iterator

import numpy as np
from jaxtyping import UInt8

from vmoe.config.preprocessing import Preprocessing
from vmoe.data.decode import open_image
from vmoe.data.resize import Resized, resize
from vmoe.data.sources.source import Source, sampled
from vmoe.errors import UsageError

EXTREME = 4  # resizing by more than this ratio is reported
LONGEST = 16  # ratio of sides; of longer images only the middle is resized


def resize_and_crop(pixels: UInt8[np.ndarray, "h0 w0 3"], preprocessing: Preprocessing) -> Resized:
    """Resizes an image and cuts out its center, a square of the model's size.

    Sides and offsets are rounded as in torchvision, and therefore in timm. For the interpolations
    ``tf_...`` they are rounded as in the V-MoE authors' code, for ``torch_...`` as in transformers.

    Returns:
        pixels in [0, 255]: float32 for the interpolation ``tf_area``, else uint8.
    """
    size, interpolation = preprocessing.image_size, preprocessing.interpolation
    h = w = preprocessing.resize_to or size
    tensorflow = interpolation.startswith("tf_")
    if preprocessing.keep_aspect:
        pixels = _without_far_ends(pixels)
        h, w = (_side(side, min(pixels.shape[:2]), h, tensorflow) for side in pixels.shape[:2])
    resized = resize(pixels, h, w, interpolation)
    down = interpolation.startswith(("tf_", "torch_"))
    y, x = ((side - size) // 2 if down else round((side - size) / 2) for side in (h, w))
    return resized[y : y + size, x : x + size]


def _without_far_ends(pixels: UInt8[np.ndarray, "h0 w0 3"]) -> UInt8[np.ndarray, "_ _ 3"]:
    """The middle of a very long image; a central square shows nothing else.

    Otherwise an image of 1000 x 1 pixels, a file of 83 bytes, would take gigabytes when enlarged.
    """
    longest = LONGEST * min(pixels.shape[:2])
    y, x = (max(0, (side - longest) // 2) for side in pixels.shape[:2])
    return pixels[y : pixels.shape[0] - y, x : pixels.shape[1] - x]


def _side(side: int, shorter: int, resize_to: int, tensorflow: bool) -> int:
    """The new length of a side of an image whose shorter side becomes ``resize_to``."""
    if tensorflow:
        return int(np.rint(np.float32(side) * (np.float32(resize_to) / np.float32(shorter))))
    return int(resize_to * side / shorter)


def resizing_messages(source: Source, size: int, *, keep_aspect: bool = False) -> Iterator[str]:
    """Warnings if images in a sample are enlarged or shrunk more than fourfold.

    Args:
        size: side of the square to which the images are resized, in pixels.
        keep_aspect: the shorter side is resized, and the longer one cropped.
    """
    sides, side = [_sides(source, i) for i in sampled(len(source))], min if keep_aspect else max
    for change, found in {
        "enlarged": [each for each in sides if 0 < EXTREME * side(each[1:]) < size],
        "shrunk": [each for each in sides if side(each[1:]) > EXTREME * size],
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
        with open_image(io.BytesIO(example.image), example.origin) as image:
            return example.origin, image.height, image.width
    except (UsageError, OSError, ValueError, SyntaxError):
        return "", 0, 0
