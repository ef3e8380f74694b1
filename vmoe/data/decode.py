"""Decodes the bytes of image files to pixels."""

import io
import struct
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import UInt8
from PIL import Image, ImageOps, TiffImagePlugin, UnidentifiedImageError

from vmoe.config.preprocessing import MAX_PIXELS
from vmoe.data.files import read_bytes
from vmoe.errors import UsageError
from vmoe.host.retry import read_regular

PNG = b"\x89PNG\r\n\x1a\n"  # the first bytes of a file
Pixels = UInt8[np.ndarray, "h w 3"]
"""RGB, in [0, 255]."""

BACKGROUND = "white"  # shows through transparent pixels
TWELVE_BITS = 4096  # values of 12 bits
MIN_IS_WHITE, PLANAR, SIGNED = 0, 2, 2
"""Values of a TIFF's tags: photometric interpretation, planar configuration, sample format."""
REMEDY = "save it with 8 bits per channel"  # for values whose white level is unknown

FORMATS = ("BMP", "GIF", "JPEG", "PNG", "TIFF", "WEBP")  # Pillow's names of the formats of SUFFIXES

# Pillow loads its plugins for less common formats on first use. That is not safe in several
# threads: one of them may then fail to identify such an image.
Image.init()


def decode(
    image: bytes | UInt8[np.ndarray, "h w 3"],
    origin: str,
    *,
    exif: bool = True,
    max_pixels: int = MAX_PIXELS,
) -> UInt8[np.ndarray, "h w 3"]:
    """Decodes the bytes of an image file to RGB pixels in [0, 255].

    Gray becomes three equal channels and CMYK is converted. 16 bits become 8: 65,535 becomes 255.
    Transparent pixels are blended with a white background. An array of pixels is returned
    unchanged.

    Args:
        origin: where the image comes from, for error messages.
        exif: apply the EXIF orientation; TensorFlow's decoder ignores it. Pillow always applies
            the orientation of TIFF files.
        max_pixels: most pixels of an image file.

    Raises:
        UsageError: the bytes are not a complete image, its header declares too many pixels, or its
            values have no defined range: 32-bit integers, floats, signed values, or fewer than 13
            of 16 bits; or Pillow cannot read its layout.
    """
    if not isinstance(image, bytes):
        return image
    try:
        with open_image(io.BytesIO(image), origin, max_pixels) as opened:
            tags = opened.tag_v2 if isinstance(opened, TiffImagePlugin.TiffImageFile) else {}
            bits = tags.get(TiffImagePlugin.BITSPERSAMPLE, (1,))
            deep = has_16_bits(image) or max(bits) > 8
            _check_layout(tags, bits, origin)
            negative = tags.get(TiffImagePlugin.PHOTOMETRIC_INTERPRETATION) == MIN_IS_WHITE
            turned = ImageOps.exif_transpose(opened) if exif else opened
            if deep:
                _check_white(turned, origin)
            return np.asarray(_rgb(turned, origin, negative=negative))
    except UnidentifiedImageError:
        raise UsageError(f"{origin}: not an image, or in a format that cannot be read") from None
    except (UsageError, MemoryError):
        raise
    except Exception as error:  # Pillow's decoders raise errors of many types
        raise UsageError(f"{origin}: cannot be read as an image ({error})") from None


def open_image(
    file: io.BytesIO | io.BufferedReader, origin: str, max_pixels: int = MAX_PIXELS
) -> Image.Image:
    """Opens an image with Pillow, which reads its header, and checks its number of pixels.

    Only the formats of ``SUFFIXES`` are accepted, whatever its name: some other formats of Pillow
    do more than decode, PostScript starts Ghostscript. This is ``Image.open`` without Pillow's own
    limits, the first of which prints a warning that names no file.

    Raises:
        UnidentifiedImageError: it is not an image, or has another format.
        UsageError: it has too many pixels.
    """
    prefix = file.read(16)
    for name in FORMATS:
        make, accepts = Image.OPEN[name]
        if not accepts or accepts(prefix) is not True:  # a text: Pillow lacks the decoder
            continue
        file.seek(0)
        try:
            image = make(file, "")
        except (SyntaxError, IndexError, TypeError, struct.error):  # of another format, or damaged
            continue
        except Image.DecompressionBombError as error:  # of a part, such as a frame of a GIF
            problem = f"a part has more pixels than data.max_pixels={max_pixels} ({error})"
            raise UsageError(f"{origin}: {problem}; make it smaller") from None
        if image.width * image.height > max_pixels:
            raise UsageError(
                f"{origin}: {image.width:,} x {image.height:,} pixels are more than "
                f"data.max_pixels={max_pixels}; make it smaller, or raise that"
            )
        return image
    raise UnidentifiedImageError("cannot identify image")


def has_16_bits(head: bytes) -> bool:
    """Whether the first 25 bytes of a file begin a PNG with 16 bits per channel."""
    return head.startswith(PNG) and head[24:25] == b"\x10"


def _check_layout(tags: Mapping[int, Any], bits: Sequence[int], origin: str) -> None:
    """Checks that a TIFF has no layout that Pillow reads as unsigned values of 8 bits."""
    planar = tags.get(TiffImagePlugin.PLANAR_CONFIGURATION) == PLANAR
    if planar and len(bits) > 1 and max(bits) > 8:
        problem = "its channels of 16 bits are stored one after another"
        raise UsageError(f"{origin}: {problem}; {REMEDY}")
    if max(bits) == 8 and SIGNED in tags.get(TiffImagePlugin.SAMPLEFORMAT, ()):
        raise UsageError(f"{origin}: its values are signed; {REMEDY}")


def _check_white(image: Image.Image, origin: str) -> None:
    """Checks that an image whose 16 bits became 8 did not use only the lower 12 of them."""
    values = np.asarray(image)
    colors = values[..., :-1] if image.mode in ("LA", "RGBA") else values
    if values.dtype == np.uint8 and 0 < colors.max() < TWELVE_BITS / 256:
        problem = "its 16-bit values use less than 13 bits, so white is not 65,535"
        raise UsageError(f"{origin}: {problem}; {REMEDY}")


def read_image(
    path: str | Path, *, exif: bool = True, max_pixels: int = MAX_PIXELS
) -> UInt8[np.ndarray, "h w 3"]:
    """Reads an image file and decodes it; see ``decode``."""
    content = read_bytes(path, read_regular)
    return decode(content, str(path), exif=exif, max_pixels=max_pixels)


def _rgb(image: Image.Image, origin: str, *, negative: bool) -> Image.Image:
    if image.mode.startswith("I;16"):  # which Pillow would clip at 255
        values = np.asarray(image)
        if 0 < values.max() < TWELVE_BITS:
            problem = f"its 16-bit values end at {values.max()}, so white is not 65,535"
            raise UsageError(f"{origin}: {problem}; {REMEDY}")
        values = 65535 - values if negative else values  # Pillow inverts at most 8 bits
        return Image.fromarray((values / 257).astype(np.uint8)).convert("RGB")
    if image.mode in ("I", "F"):
        values = "32-bit integers" if image.mode == "I" else "floats"
        raise UsageError(f"{origin}: {values} (mode {image.mode}); {REMEDY}")
    if image.has_transparency_data:
        image = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, BACKGROUND), image)
    return image.convert("RGB")
