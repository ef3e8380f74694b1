"""Image files to pixels."""

import os
from pathlib import Path

import numpy as np
from jaxtyping import UInt8
from PIL import Image, ImageOps, UnidentifiedImageError

from vmoe.errors import UsageError

SUFFIXES = (".png", ".jpg", ".jpeg", ".webp", ".bmp", ".gif", ".tif", ".tiff")


def image_files_below(folder: Path) -> tuple[list[Path], int]:
    """The image files in a folder and below it, sorted; and how many other files lie there.

    What is hidden, a file or a folder, is passed over.

    Raises:
        UsageError: a folder there cannot be read.
    """

    def refuse(error: OSError) -> None:
        if isinstance(error, FileNotFoundError):  # a class of which this part has no image
            return
        raise UsageError(f"{error.filename}: {error.strerror}; make it readable, or move it away")

    files = []
    for place, folders, names in os.walk(folder, onerror=refuse):
        folders[:] = [name for name in folders if not name.startswith(".")]
        files += [Path(place, name) for name in names if not name.startswith(".")]
    files = sorted(path for path in files if path.is_file())
    images = [path for path in files if path.suffix.lower() in SUFFIXES]
    return images, len(files) - len(images)


def read_image(path: str | Path) -> UInt8[np.ndarray, "h w 3"]:
    """An image file as RGB pixels in [0, 255], turned upright as its EXIF says.

    Grey becomes three equal channels, CMYK is converted, 16 bits become 8, and of transparency
    only the colours stay.

    Raises:
        UsageError: there is no such file, or it is not a whole image.
    """
    try:
        with Image.open(path) as image:
            return np.asarray(_rgb(ImageOps.exif_transpose(image)))
    except FileNotFoundError:
        raise UsageError(f"{path}: no such file") from None
    except UnidentifiedImageError:
        raise UsageError(f"{path}: not an image, or of a kind that cannot be read") from None
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError) as error:
        raise UsageError(f"{path}: cannot be read as an image ({error})") from None


def _rgb(image: Image.Image) -> Image.Image:
    if image.mode.startswith("I"):  # 16 bits, which Pillow would cut off at 255
        return Image.fromarray((np.asarray(image) / 257).astype(np.uint8)).convert("RGB")
    if image.mode == "P":  # a palette may hold transparency
        image = image.convert("RGBA")
    return image.convert("RGB")
