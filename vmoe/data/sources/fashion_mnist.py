"""Fashion-MNIST: 70,000 grey images of 28 x 28 pixels, ten kinds of clothing (arXiv 1708.07747).

From a folder that holds its four ``.gz`` files; from where Debian's package dataset-fashion-mnist
puts them; or downloaded once from their official address into the user's cache. Its 60,000
training images are split here, stratified by class and fixed: 55,000 train, 5,000 validation.
"""

import functools
import gzip
import hashlib
import http.client
import os
import tempfile
import urllib.request
import zlib
from pathlib import Path

import numpy as np

from vmoe.data.sources.source import Source, rgb, shares
from vmoe.errors import UsageError

ADDRESS = "http://fashion-mnist.s3-website.eu-central-1.amazonaws.com"
DEBIAN = Path("/usr/share/datasets/fashion-mnist")
NAMES = (
    *("T-shirt/top", "Trouser", "Pullover", "Dress", "Coat"),
    *("Sandal", "Shirt", "Sneaker", "Bag", "Ankle boot"),
)
# Of the unpacked files, since the archives' own differ with who packed them.
SHA256 = {
    "train-images-idx3-ubyte": "c59f468a2f672dc815687fe0f83887768d799fd8a3f3276145d20f83aa44d888",
    "train-labels-idx1-ubyte": "bad3541b69d912435c50bb6ba87bec294ff4f6a2e1246121d8633921760443d9",
    "t10k-images-idx3-ubyte": "5b4141f0afbad91edebe8549f8fcffe087ea10ca49f1dbef5c9a5cd8815ce37b",
    "t10k-labels-idx1-ubyte": "0402a96d92fd2663957122ceb108a494c5af83dab82d92729df917d7dec38c34",
}
LARGEST = 16 + 60_000 * 28 * 28  # bytes of an unpacked file


def open_fashion_mnist(folder: str, split: str) -> Source:
    """A split of Fashion-MNIST; found or downloaded where no folder is given.

    Raises:
        UsageError: a file is missing, damaged or cannot be downloaded.
    """
    part = "t10k" if split == "test" else "train"
    images, labels = _read(Path(folder) if folder else _find(), part)
    if part == "train":
        index = shares(labels, {"validation": 1 / 12}, names=NAMES, place="fashion_mnist")[split]
        images, labels = images[index], labels[index]
    return Source(f"fashion_mnist:{split}", rgb(images), labels, NAMES)


@functools.cache
def _read(folder: Path, part: str) -> tuple[np.ndarray, np.ndarray]:
    images = unpacked(folder / f"{part}-images-idx3-ubyte.gz")
    labels = unpacked(folder / f"{part}-labels-idx1-ubyte.gz")
    return (
        np.frombuffer(images, np.uint8, offset=16).reshape(-1, 28, 28),
        np.frombuffer(labels, np.uint8, offset=8).astype(np.int64),
    )


def unpacked(path: Path) -> bytes:
    """The bytes in one of the four files, which are the published ones.

    Raises:
        UsageError: there is no such file, or it is damaged.
    """
    try:
        with gzip.open(path) as file:
            content = file.read(LARGEST + 1)
    except FileNotFoundError:
        raise UsageError(f"{path}: no such file; the folder of fashion_mnist holds it") from None
    except (OSError, EOFError, zlib.error) as error:
        raise UsageError(f"{path}: damaged ({error}); remove it and get it again") from None
    if hashlib.sha256(content).hexdigest() != SHA256[path.stem]:
        raise UsageError(f"{path}: damaged, its SHA-256 is another; remove it and get it again")
    return content


def _find() -> Path:
    """The folder that holds the files, which are downloaded if there is none."""
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "vmoe/fashion_mnist"
    for folder in (DEBIAN, cache):
        if all((folder / f"{name}.gz").is_file() for name in SHA256):
            return folder
    for name in SHA256:
        if not (cache / f"{name}.gz").is_file():
            download(f"{ADDRESS}/{name}.gz", cache / f"{name}.gz")
    return cache


def download(address: str, path: Path) -> None:
    """Fetches one of the four files, with a line of progress, and keeps it if it is whole.

    Raises:
        UsageError: the address cannot be reached, or what came is not the file.
    """
    from rich.console import Console
    from rich.progress import DownloadColumn, Progress, TextColumn, TimeRemainingColumn

    columns = (TextColumn(path.name), DownloadColumn(), TimeRemainingColumn())
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with (
            tempfile.TemporaryDirectory(dir=path.parent) as folder,
            urllib.request.urlopen(address, timeout=30) as response,
            Progress(*columns, console=Console(stderr=True)) as progress,
        ):
            beside = Path(folder) / path.name  # two processes may fetch it at once
            total = int(response.headers.get("Content-Length", 0)) or None
            task = progress.add_task("", total=total)
            with beside.open("wb") as file:
                while chunk := response.read(1 << 18):
                    file.write(chunk)
                    progress.advance(task, len(chunk))
            unpacked(beside)
            os.replace(beside, path)
    except (OSError, http.client.HTTPException) as error:
        raise UsageError(
            f"{address} cannot be downloaded into {path.parent} ({error}): get Fashion-MNIST by "
            "other means (on Debian the package dataset-fashion-mnist) and name its folder, "
            "fashion_mnist:FOLDER"
        ) from None
