"""Image files: finding them, reading their bytes, decoding the bytes to pixels."""

import io
import os
from pathlib import Path

import numpy as np
from jaxtyping import UInt8
from PIL import Image, ImageOps, UnidentifiedImageError

from vmoe.errors import UsageError

SUFFIXES = (".png", ".jpg", ".jpeg", ".webp", ".bmp", ".gif", ".tif", ".tiff")


def image_files_below(folder: Path) -> tuple[list[Path], int]:
    """Finds the image files in a folder and its sub-folders.

    Hidden files and folders are ignored.

    Returns:
        the paths of the image files, sorted; and the number of other files.

    Raises:
        UsageError: one of the folders cannot be read.
    """

    def on_error(error: OSError) -> None:
        if isinstance(error, FileNotFoundError):  # a class without images in this split
            return
        raise UsageError(f"{error.filename}: {error.strerror}; make it readable, or move it away")

    files = []
    for parent, folders, names in os.walk(folder, onerror=on_error):
        folders[:] = [name for name in folders if not name.startswith(".")]
        files += [Path(parent, name) for name in names if not name.startswith(".")]
    files = sorted(path for path in files if path.is_file())
    images = [path for path in files if path.suffix.lower() in SUFFIXES]
    return images, len(files) - len(images)


def read_bytes(path: str | Path) -> bytes:
    """The content of a file.

    Raises:
        UsageError: there is no such file, or it cannot be read.
    """
    try:
        return Path(path).read_bytes()
    except FileNotFoundError:
        raise UsageError(f"{path}: no such file") from None
    except (OSError, ValueError) as error:
        raise UsageError(f"{path}: cannot be read ({error})") from None


def decode(image: bytes | UInt8[np.ndarray, "h w 3"], origin: str) -> UInt8[np.ndarray, "h w 3"]:
    """Decodes the bytes of an image file to RGB pixels in [0, 255], in its EXIF orientation.

    Grey becomes three equal channels, CMYK is converted, 16 bits become 8, and transparency is
    ignored. An array of pixels is returned unchanged.

    Args:
        origin: where the image comes from, for error messages.

    Raises:
        UsageError: the bytes are not a complete image.
    """
    if not isinstance(image, bytes):
        return image
    try:
        with Image.open(io.BytesIO(image)) as opened:
            return np.asarray(_rgb(ImageOps.exif_transpose(opened)))
    except UnidentifiedImageError:
        raise UsageError(f"{origin}: not an image, or in a format that cannot be read") from None
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError) as error:
        raise UsageError(f"{origin}: cannot be read as an image ({error})") from None


def read_image(path: str | Path) -> UInt8[np.ndarray, "h w 3"]:
    """Reads an image file and decodes it; see ``decode``.

    Raises:
        UsageError: there is no such file, or it is not a complete image.
    """
    return decode(read_bytes(path), str(path))


def _rgb(image: Image.Image) -> Image.Image:
    if image.mode.startswith("I"):  # 16 bits, which Pillow would clip at 255
        return Image.fromarray((np.asarray(image) / 257).astype(np.uint8)).convert("RGB")
    if image.mode == "P":  # a palette may hold transparency
        image = image.convert("RGBA")
    return image.convert("RGB")
