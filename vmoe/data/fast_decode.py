"""The decoder ``fast``: decodes, crops and resizes an image with faster libraries than Pillow.

libjpeg-turbo (``simplejpeg``) decodes a JPEG, at a half, a quarter or an eighth of its size if the
crop is then still at least as large as the result. It uses nearest-neighbor chroma upsampling and
the fast DCT, so a channel differs from Pillow's by a few levels on average. OpenCV decodes PNG,
WebP and BMP exactly as Pillow does; BMP of 16 bits per pixel differs by up to 7 levels. It resizes
bilinearly without antialiasing, which equals ``tf_bilinear`` up to one level.
"""

import functools
import io
from collections.abc import Callable
from types import ModuleType
from typing import NamedTuple

import numpy as np
import simplejpeg
from jaxtyping import UInt8
from PIL import ExifTags

from vmoe.config.preprocessing import MAX_PIXELS
from vmoe.data.decode import PNG, Pixels, decode, has_16_bits, open_image
from vmoe.data.random_crop import Box

FORMATS = ("JPEG", "MPO", "PNG", "WEBP", "BMP")  # Pillow's names
JPEG, SCAN = b"\xff\xd8", b"\xff\xda"  # markers: the start of the file and of its pixels
EXIF, XMP = b"Exif\0\0", b"http://ns.adobe.com/xap/1.0/"
IN_PNG = (b"eXIf", b"Raw profile type exif", b"XML:com.adobe.xmp")  # may hold an orientation
COLORS = ("YCbCr", "RGB", "Gray")  # simplejpeg's names of a JPEG's color spaces
FLIPS = {2: 1, 3: -1, 4: 0, 6: 1, 7: -1, 8: 0}  # EXIF orientation -> OpenCV's flip code
TRANSPOSED = range(5, 9)  # EXIF orientations with a transposition, before the flip


@functools.cache
def opencv() -> ModuleType:
    """OpenCV, without messages and without its own threads, because the readers use all cores.

    It is imported on first use: the import takes a while.
    """
    import cv2

    cv2.setNumThreads(0)
    cv2.utils.logging.setLogLevel(cv2.utils.logging.LOG_LEVEL_SILENT)
    return cv2


class _Header(NamedTuple):
    """Height and width as stored, and the EXIF orientation to apply."""

    h: int
    w: int
    orientation: int


def decode_crop_and_resize(
    image: bytes | UInt8[np.ndarray, "h0 w0 3"],
    origin: str,
    choose_box: Callable[[int, int], Box],
    size: int,
    *,
    exif: bool = True,
    max_pixels: int = MAX_PIXELS,
) -> tuple[Pixels, bool]:
    """Decodes an image, cuts a box out of it and resizes the box to a square.

    ``decode`` reads the images that the fast libraries would read differently: CMYK, 16 bits,
    transparency, palettes, other formats, and broken files. All runs in the calling thread.

    Args:
        choose_box: called with the height and the width of the image, in pixels.
        size: side of the result, in pixels.

    Returns:
        the pixels in [0, 255]; and whether ``decode`` had to read the image.
    """
    header = _header(image, exif, max_pixels) if isinstance(image, bytes) else None
    if isinstance(image, bytes) and header:
        h, w = (header.w, header.h) if header.orientation in TRANSPOSED else (header.h, header.w)
        box = choose_box(h, w)
        # Reduces a JPEG as far as the box stays at least as large as the result.
        scales = (8, 4, 2) if image.startswith(JPEG) else ()
        scale = next((each for each in scales if min(box.h, box.w) >= each * size), 1)
        pixels = _decoded(image, header, scale)
        if pixels is not None:
            return _resized(pixels, _scaled(box, scale), size), False
    pixels = decode(image, origin, exif=exif, max_pixels=max_pixels)
    box = choose_box(*pixels.shape[:2])
    return _resized(pixels, box, size), isinstance(image, bytes)


def _header(image: bytes, exif: bool, max_pixels: int) -> _Header | None:
    """The header of an image; None if the fast libraries are not to read the image."""
    try:
        head = _before_pixels(image) if image.startswith(JPEG) and exif else b""
        if image.startswith(JPEG) and not (EXIF in head or XMP in head):
            h, w, colors, _ = simplejpeg.decode_jpeg_header(image)
            plain = colors in COLORS and int(h) * int(w) <= max_pixels
            return _Header(int(h), int(w), 1) if plain else None
        with open_image(io.BytesIO(image), "", max_pixels) as opened:
            plain = opened.mode in ("RGB", "L") and not opened.has_transparency_data
            if opened.format not in FORMATS or not plain or has_16_bits(image):
                return None
            # Pillow decodes a PNG to find its EXIF block, which may follow the pixels.
            exif = exif and not (image.startswith(PNG) and not any(x in image for x in IN_PNG))
            orientation = opened.getexif().get(ExifTags.Base.Orientation, 1) if exif else 1
            return _Header(opened.height, opened.width, orientation)
    except MemoryError:
        raise
    except Exception:  # Pillow raises errors of many types, which decode reports
        return None


def _before_pixels(image: bytes) -> bytes:
    """The segments of a JPEG before its compressed pixels, whose search would take 7% of the time.

    All bytes, if the segments do not follow each other.
    """
    at = len(JPEG)
    while image[at : at + 2] != SCAN:
        if image[at : at + 1] != SCAN[:1]:
            return image
        at += 2 + int.from_bytes(image[at + 2 : at + 4])
    return image[:at]


def _scaled(box: Box, scale: int) -> Box:
    """A box in a reduced image; pixels that it covers in part are included."""
    y, x = box.y // scale, box.x // scale
    return Box(y, x, -(-(box.y + box.h) // scale) - y, -(-(box.x + box.w) // scale) - x)


def _decoded(image: bytes, header: _Header, scale: int) -> Pixels | None:
    """The pixels of an image, of a JPEG reduced by a scale; None if the image is broken."""
    cv2 = opencv()
    if image.startswith(JPEG):
        h, w = (-(-side // scale) for side in (header.h, header.w))
        try:
            pixels = simplejpeg.decode_jpeg(
                image, fastdct=True, fastupsample=True, min_height=h, min_width=w, min_factor=scale
            )
        except ValueError:
            return None
    else:
        flags = cv2.IMREAD_COLOR_RGB | cv2.IMREAD_IGNORE_ORIENTATION
        pixels = cv2.imdecode(np.frombuffer(image, np.uint8), flags)
        if pixels is None:
            return None
    if header.orientation in TRANSPOSED:
        pixels = cv2.transpose(pixels)
    flip = FLIPS.get(header.orientation)
    return pixels if flip is None else cv2.flip(pixels, flip)


def _resized(pixels: UInt8[np.ndarray, "h0 w0 3"], box: Box, size: int) -> Pixels:
    cv2 = opencv()
    return cv2.resize(pixels[box.slices], (size, size), interpolation=cv2.INTER_LINEAR)
