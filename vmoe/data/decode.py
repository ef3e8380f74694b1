"""Image files: finding them, reading their bytes, decoding the bytes to pixels."""

import io
import os
import stat
import struct
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import UInt8
from PIL import Image, ImageOps, TiffImagePlugin, UnidentifiedImageError

from vmoe.config.preprocessing import MAX_PIXELS
from vmoe.errors import UsageError
from vmoe.retry import read_regular, retried

PNG = b"\x89PNG\r\n\x1a\n"  # the first bytes of a file
Pixels = UInt8[np.ndarray, "h w 3"]
"""RGB, in [0, 255]."""

SUFFIXES = (".png", ".jpg", ".jpeg", ".webp", ".bmp", ".gif", ".tif", ".tiff")
BACKGROUND = "white"  # shows through transparent pixels
TWELVE_BITS = 4096  # values of 12 bits
MIN_IS_WHITE, PLANAR, SIGNED = 0, 2, 2
"""Values of a TIFF's tags: photometric interpretation, planar configuration, sample format."""
REMEDY = "save it with 8 bits per channel"  # for values whose white level is unknown

FORMATS = ("BMP", "GIF", "JPEG", "PNG", "TIFF", "WEBP")  # Pillow's names of the formats of SUFFIXES

# Pillow loads its plugins for less common formats on first use. That is not safe in several
# threads: one of them may then fail to identify such an image.
Image.init()


class ImageFile(NamedTuple):
    """A file with an image suffix.

    Attributes:
        path: path of the file.
        size: size in bytes; below 0 if there is no such file.
        modified: time of the last change of the content, in nanoseconds.
    """

    path: str
    size: int
    modified: int


def image_files_below(folder: str | Path) -> tuple[list[ImageFile], list[str], list[str]]:
    """Finds the image files in a folder and its sub-folders.

    Hidden files and folders are ignored.

    Returns:
        the files with an image suffix; all other files; and symbolic links to folders, which are
        not followed. Each list is sorted by path.
    """
    images, others, links = list[ImageFile](), list[str](), list[str]()
    for entry in entries_below(str(folder)):
        image = os.path.splitext(entry.name)[1].lower() in SUFFIXES
        status = _status(entry) if image or entry.is_symlink() else None
        if status and stat.S_ISDIR(status.st_mode):
            links.append(entry.path)
        elif status and image and stat.S_ISREG(status.st_mode):
            images.append(ImageFile(entry.path, status.st_size, status.st_mtime_ns))
        else:
            others.append(entry.path)
    return sorted(images), sorted(others), sorted(links)


def entries_of(folder: str | Path) -> list[os.DirEntry[str]]:
    """The entries of a folder that are not hidden."""
    entries = retried(folder, lambda: list(os.scandir(folder)))
    return [entry for entry in entries if not entry.name.startswith(".")]


def entries_below(folder: str) -> Iterator[os.DirEntry[str]]:
    """All files, and all links to folders, below a folder; hidden ones are left out.

    Raises:
        UsageError: one of the folders cannot be read.
        Failure: it cannot be read for a temporary reason.
    """
    try:
        entries = entries_of(folder)
    except FileNotFoundError:  # a class without images in this split
        return
    except OSError as error:
        message = f"{error.filename}: {error.strerror}; make it readable, or move it away"
        raise UsageError(message) from None
    for entry in entries:
        if entry.is_dir(follow_symlinks=False):
            yield from entries_below(entry.path)
        else:
            yield entry


def is_folder(entry: os.DirEntry[str]) -> bool:
    """Whether an entry is a folder, or a link to one."""
    status = _status(entry) if entry.is_symlink() else None
    return stat.S_ISDIR(status.st_mode) if status else entry.is_dir(follow_symlinks=False)


def _status(entry: os.DirEntry[str]) -> os.stat_result | None:
    """The status of an entry, with links followed; None for a broken link."""
    try:
        return retried(entry.path, entry.stat)
    except PermissionError:
        raise
    except OSError:
        return None


def read_bytes(path: str | Path, read: Callable[[Path], bytes] = Path.read_bytes) -> bytes:
    """The content of a file.

    Args:
        read: how it is read.

    Raises:
        UsageError: there is no such file, or it cannot be read.
        Failure: it cannot be read for a temporary reason.
    """
    try:
        return retried(path, lambda: read(Path(path)))
    except FileNotFoundError:
        raise UsageError(f"{path}: no such file") from None
    except (OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or error
        raise UsageError(f"{path}: cannot be read ({reason})") from None


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
    """Checks that a TIFF has no layout that Pillow reads as unsigned values of 8 bits.

    Args:
        bits: bits of each channel.
    """
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
