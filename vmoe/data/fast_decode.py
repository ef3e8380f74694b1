"""The fast mode: OpenCV decodes, crops and resizes an image at once.

It decodes a JPEG at a half, a quarter or an eighth of its size where the crop is then still at
least as large as the result, and resizes bilinearly without antialiasing. At full size, its pixels
equal Pillow's; after resizing they differ from ``tf_bilinear`` by at most one level.
"""

import functools
import io
from collections.abc import Callable
from types import ModuleType
from typing import NamedTuple

import numpy as np
from jaxtyping import UInt8
from PIL import ExifTags, Image

from vmoe.data.decode import decode, has_16_bits
from vmoe.data.random_crop import Box

Pixels = UInt8[np.ndarray, "h w 3"]

JPEGS = ("JPEG", "MPO")  # Pillow's names; MPO is a JPEG with further pictures behind it
FORMATS = (*JPEGS, "PNG", "WEBP", "BMP")
FLIPS = {2: 1, 3: -1, 4: 0, 6: 1, 7: -1, 8: 0}  # EXIF orientation -> the flip, as OpenCV's code
TRANSPOSED = range(5, 9)  # EXIF orientations with a transposition, before the flip


class Decoded(NamedTuple):
    """An image in the model's size.

    Attributes:
        pixels: in [0, 255].
        refused: OpenCV does not read images of this kind as ``decode`` does, which was used.
    """

    pixels: Pixels
    refused: bool


class _Header(NamedTuple):
    """Height and width as stored, the EXIF orientation to apply, and whether it is a JPEG."""

    h: int
    w: int
    orientation: int
    jpeg: bool


def decode_crop_and_resize(
    image: bytes | UInt8[np.ndarray, "h0 w0 3"],
    origin: str,
    choose_box: Callable[[int, int], Box],
    size: int,
    *,
    exif: bool = True,
) -> Decoded:
    """Decodes an image, cuts a box out of it and resizes the box to a square.

    OpenCV refuses what it reads differently from ``decode``: CMYK, 16 bits, transparency, palettes,
    and files that are broken. It runs in the calling thread; its own threads are turned off.

    Args:
        image: the bytes of an image file, or pixels in [0, 255].
        origin: where the image comes from, for error messages.
        choose_box: called with the height and the width of the image, in pixels.
        size: side of the result, in pixels.
        exif: apply the EXIF orientation.

    Raises:
        UsageError: see ``decode``.
    """
    header = _header(image, exif) if isinstance(image, bytes) else None
    if isinstance(image, bytes) and header:
        h, w = (header.w, header.h) if header.orientation in TRANSPOSED else (header.h, header.w)
        box = choose_box(h, w)
        scale = _scale(box, size) if header.jpeg else 1
        pixels = _decoded(image, header.orientation, scale)
        if pixels is not None:
            return Decoded(_resized(pixels, _scaled(box, scale), size), refused=False)
    pixels = decode(image, origin, exif=exif)
    box = choose_box(*pixels.shape[:2])
    return Decoded(_resized(pixels, box, size), refused=isinstance(image, bytes))


def _header(image: bytes, exif: bool) -> _Header | None:
    """The header of an image; None if OpenCV reads such an image differently from Pillow."""
    try:
        with Image.open(io.BytesIO(image)) as opened:
            plain = opened.mode in ("RGB", "L") and not opened.has_transparency_data
            if opened.format not in FORMATS or not plain or has_16_bits(image):
                return None
            orientation = opened.getexif().get(ExifTags.Base.Orientation, 1) if exif else 1
            return _Header(opened.height, opened.width, orientation, opened.format in JPEGS)
    except MemoryError:
        raise
    except Exception:  # Pillow raises errors of many types, which decode names
        return None


def _scale(box: Box, size: int) -> int:
    """The largest reduction of a JPEG that leaves a box at least as large as the result."""
    return next((scale for scale in (8, 4, 2) if min(box.h, box.w) >= scale * size), 1)


def _scaled(box: Box, scale: int) -> Box:
    """The pixels of a reduced image that a box covers, also in part."""
    y, x = box.y // scale, box.x // scale
    return Box(y, x, -(-(box.y + box.h) // scale) - y, -(-(box.x + box.w) // scale) - x)


def _decoded(image: bytes, orientation: int, scale: int) -> Pixels | None:
    """The pixels of the image reduced by a scale; None if it is broken."""
    cv2 = _opencv()
    flags = (
        cv2.IMREAD_IGNORE_ORIENTATION
        | {
            1: cv2.IMREAD_COLOR,
            2: cv2.IMREAD_REDUCED_COLOR_2,
            4: cv2.IMREAD_REDUCED_COLOR_4,
            8: cv2.IMREAD_REDUCED_COLOR_8,
        }[scale]
    )
    bgr = cv2.imdecode(np.frombuffer(image, np.uint8), flags)
    if bgr is None:
        return None
    pixels = cv2.cvtColor(bgr, cv2.COLOR_BGR2RGB)
    if orientation in TRANSPOSED:
        pixels = cv2.transpose(pixels)
    return cv2.flip(pixels, FLIPS[orientation]) if orientation in FLIPS else pixels


def _resized(pixels: UInt8[np.ndarray, "h0 w0 3"], box: Box, size: int) -> Pixels:
    cv2 = _opencv()
    return cv2.resize(pixels[box.slices], (size, size), interpolation=cv2.INTER_LINEAR)


@functools.cache
def _opencv() -> ModuleType:
    """OpenCV without threads of its own, as the readers fill the cores, and without messages."""
    import cv2

    cv2.setNumThreads(0)
    cv2.utils.logging.setLogLevel(cv2.utils.logging.LOG_LEVEL_SILENT)
    return cv2
