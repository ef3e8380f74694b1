"""Image files: finding them, reading their bytes, decoding the bytes to pixels."""

import io
import os
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import numpy as np
from jaxtyping import UInt8
from PIL import Image, ImageOps, UnidentifiedImageError

from vmoe.errors import UsageError

PNG = b"\x89PNG\r\n\x1a\n"  # the first bytes of a file
SUFFIXES = (".png", ".jpg", ".jpeg", ".webp", ".bmp", ".gif", ".tif", ".tiff")
BACKGROUND = "white"  # shows through transparent pixels
TWELVE_BITS = 4096  # values of 12 bits

# Pillow loads the less common formats when it meets an image of one, which is not safe in several
# threads: one of them may take such an image for none.
Image.init()


class ImageFile(NamedTuple):
    """A file with the suffix of an image.

    Attributes:
        path: to the file.
        size: in bytes.
        modified: time of the last change of the content, in nanoseconds.
    """

    path: str
    size: int
    modified: int


class Found(NamedTuple):
    """What a folder and its sub-folders hold, each sorted by path.

    Attributes:
        images: files with the suffix of an image.
        others: all other files.
        links: symbolic links to folders, which are not followed.
    """

    images: list[ImageFile]
    others: list[str]
    links: list[str]


def image_files_below(folder: str | Path) -> Found:
    """Finds the image files in a folder and its sub-folders.

    Hidden files and folders are ignored.

    Raises:
        UsageError: one of the folders cannot be read.
    """
    found = Found([], [], [])
    for entry in _entries(str(folder)):
        if entry.is_dir():
            found.links.append(entry.path)
        elif entry.is_file() and os.path.splitext(entry.name)[1].lower() in SUFFIXES:
            status = entry.stat()
            found.images.append(ImageFile(entry.path, status.st_size, status.st_mtime_ns))
        else:  # also links to nothing
            found.others.append(entry.path)
    for paths in found:
        paths.sort()
    return found


def _entries(folder: str) -> Iterator[os.DirEntry[str]]:
    """Every file below a folder, and every link to a folder, without hidden ones."""
    try:
        entries = list(os.scandir(folder))
    except FileNotFoundError:  # a class without images in this split
        return
    except OSError as error:
        message = f"{error.filename}: {error.strerror}; make it readable, or move it away"
        raise UsageError(message) from None
    for entry in entries:
        if entry.name.startswith("."):
            continue
        if entry.is_dir(follow_symlinks=False):
            yield from _entries(entry.path)
        else:
            yield entry


def read_bytes(path: str | Path) -> bytes:
    """The content of a file.

    Raises:
        UsageError: there is no such file, or it cannot be read.
    """
    try:
        with open(path, "rb") as file:
            return file.read()
    except FileNotFoundError:
        raise UsageError(f"{path}: no such file") from None
    except (OSError, ValueError) as error:
        raise UsageError(f"{path}: cannot be read ({error})") from None


def decode(
    image: bytes | UInt8[np.ndarray, "h w 3"], origin: str, *, exif: bool = True
) -> UInt8[np.ndarray, "h w 3"]:
    """Decodes the bytes of an image file to RGB pixels in [0, 255].

    Grey becomes three equal channels and CMYK is converted. 16 bits become 8: 65,535 becomes 255.
    Transparent pixels are blended with a white background. An array of pixels is returned
    unchanged.

    Args:
        origin: where the image comes from, for error messages.
        exif: apply the EXIF orientation; TensorFlow's decoder ignores it.

    Raises:
        UsageError: the bytes are not a complete image, or its values have no defined range: 32-bit
            integers, floats, or fewer than 13 of 16 bits.
    """
    if not isinstance(image, bytes):
        return image
    try:
        with Image.open(io.BytesIO(image)) as opened:
            pixels = np.asarray(_rgb(ImageOps.exif_transpose(opened) if exif else opened))
        if has_16_bits(image) and 0 < pixels.max() < TWELVE_BITS / 256:
            raise _NoRange("its 16-bit values use less than 13 bits, so white is not 65,535")
        return pixels
    except UnidentifiedImageError:
        raise UsageError(f"{origin}: not an image, or in a format that cannot be read") from None
    except _NoRange as error:
        raise UsageError(f"{origin}: {error}; save it with 8 bits per channel") from None
    except MemoryError:
        raise
    except Exception as error:  # Pillow's decoders raise errors of many types
        raise UsageError(f"{origin}: cannot be read as an image ({error})") from None


def has_16_bits(head: bytes) -> bool:
    """Whether the first 25 bytes of a file are those of a PNG with 16 bits per channel."""
    return head.startswith(PNG) and head[24:25] == b"\x10"


def read_image(path: str | Path, *, exif: bool = True) -> UInt8[np.ndarray, "h w 3"]:
    """Reads an image file and decodes it; see ``decode``.

    Raises:
        UsageError: there is no such file, or it is not an image that ``decode`` accepts.
    """
    return decode(read_bytes(path), str(path), exif=exif)


class _NoRange(Exception):
    """The values of an image do not say which of them is white."""


def _rgb(image: Image.Image) -> Image.Image:
    if image.mode.startswith("I;16"):  # which Pillow would clip at 255
        values = np.asarray(image)
        if 0 < values.max() < TWELVE_BITS:
            raise _NoRange(f"its 16-bit values end at {values.max()}, so white is not 65,535")
        return Image.fromarray((values / 257).astype(np.uint8)).convert("RGB")
    if image.mode in ("I", "F"):
        raise _NoRange(
            f"{'32-bit integers' if image.mode == 'I' else 'floats'} (mode {image.mode})"
        )
    if image.has_transparency_data:
        image = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, BACKGROUND), image)
    return image.convert("RGB")
