"""Fashion-MNIST: 70,000 gray images of 28 x 28 pixels, ten kinds of clothing (arXiv 1708.07747).

Its four ``.gz`` files are read from a given folder; if none is given, from the folder of Debian's
package dataset-fashion-mnist, or from the user's cache, into which they are downloaded once from
their official URL. The 60,000 training images are split by class, always in the same way:
55,000 train, 5,000 validation.
"""

import functools
import gzip
import hashlib
import http.client
import io
import urllib.error
import urllib.request
import zlib
from pathlib import Path

import numpy as np

from vmoe.data.sources.arrays import Arrays, ArraySource, rgb
from vmoe.data.sources.splits import stratified_split
from vmoe.errors import Failure, UsageError
from vmoe.host.cache import atomic, cache_folder
from vmoe.host.retry import retried

ADDRESS = "http://fashion-mnist.s3-website.eu-central-1.amazonaws.com"
DEBIAN = Path("/usr/share/datasets/fashion-mnist")
CLASS_NAMES = (
    *("T-shirt/top", "Trouser", "Pullover", "Dress", "Coat"),
    *("Sandal", "Shirt", "Sneaker", "Bag", "Ankle boot"),
)
# Hashes of the unpacked files; the archives differ between distributors.
SHA256 = {
    "train-images-idx3-ubyte": "c59f468a2f672dc815687fe0f83887768d799fd8a3f3276145d20f83aa44d888",
    "train-labels-idx1-ubyte": "bad3541b69d912435c50bb6ba87bec294ff4f6a2e1246121d8633921760443d9",
    "t10k-images-idx3-ubyte": "5b4141f0afbad91edebe8549f8fcffe087ea10ca49f1dbef5c9a5cd8815ce37b",
    "t10k-labels-idx1-ubyte": "0402a96d92fd2663957122ceb108a494c5af83dab82d92729df917d7dec38c34",
}
MOST_BYTES = 16 + 60_000 * 28 * 28  # limit of an unpacked file


def open_fashion_mnist(folder: str, split: str) -> ArraySource:
    """Opens a split; without a folder of the files they are searched for, or downloaded."""
    return ArraySource(_read, folder, split)


def _read(folder: str, split: str) -> Arrays:
    prefix = "t10k" if split == "test" else "train"
    images, labels = _unpacked(Path(folder) if folder else _find(), prefix)
    if split != "test":
        rows = stratified_split(
            labels, {"validation": 1 / 12}, class_names=CLASS_NAMES, place="fashion_mnist"
        )[split]
        images, labels = images[rows], labels[rows]
    return f"fashion_mnist:{split}", rgb(images), labels, CLASS_NAMES, None


@functools.cache
def _unpacked(folder: Path, prefix: str) -> tuple[np.ndarray, np.ndarray]:
    images = unpack(folder / f"{prefix}-images-idx3-ubyte.gz")
    labels = unpack(folder / f"{prefix}-labels-idx1-ubyte.gz")
    return (
        np.frombuffer(images, np.uint8, offset=16).reshape(-1, 28, 28),
        np.frombuffer(labels, np.uint8, offset=8).astype(np.int64),
    )


def unpack(path: Path) -> bytes:
    """Unpacks one of the four files, and verifies its SHA-256."""
    try:
        with gzip.open(io.BytesIO(retried(path, path.read_bytes))) as file:
            content = file.read(MOST_BYTES + 1)
    except FileNotFoundError:
        raise UsageError(f"{path}: no such file; fashion_mnist needs it") from None
    except (OSError, EOFError, zlib.error) as error:
        raise UsageError(f"{path}: corrupt ({error}); remove it and download it again") from None
    if hashlib.sha256(content).hexdigest() != SHA256[path.stem]:
        raise UsageError(
            f"{path}: corrupt (its SHA-256 differs from the published one); remove it and download "
            "it again"
        )
    return content


def _find() -> Path:
    """The folder that holds the files; downloads those that are missing."""
    cache = cache_folder() / "fashion_mnist"
    for folder in (DEBIAN, cache):
        if all((folder / f"{name}.gz").is_file() for name in SHA256):
            return folder
    for name in SHA256:
        if not (cache / f"{name}.gz").is_file():
            download(f"{ADDRESS}/{name}.gz", cache / f"{name}.gz")
    return cache


def download(address: str, path: Path) -> None:
    """Downloads one of the four files, with a progress bar, and keeps it only if it is intact."""
    from rich.console import Console
    from rich.progress import DownloadColumn, Progress, TextColumn, TimeRemainingColumn

    columns = (TextColumn(path.name), DownloadColumn(), TimeRemainingColumn())
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with (
            atomic(path) as partial,  # another process may be downloading it too
            urllib.request.urlopen(address, timeout=30) as response,
            Progress(*columns, console=Console(stderr=True)) as progress,
        ):
            total = int(response.headers.get("Content-Length", 0)) or None
            task = progress.add_task("", total=total)
            with partial.open("wb") as file:
                while chunk := response.read(1 << 18):
                    file.write(chunk)
                    progress.advance(task, len(chunk))
            unpack(partial)
    except (OSError, http.client.HTTPException) as error:
        missing = isinstance(error, urllib.error.HTTPError) and error.code in (404, 410)
        raise (UsageError if missing else Failure)(
            f"{address} cannot be downloaded into {path.parent} ({error}): get Fashion-MNIST "
            "elsewhere (on Debian, the package dataset-fashion-mnist) and use "
            "fashion_mnist:FOLDER"
        ) from None
