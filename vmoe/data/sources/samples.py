"""Test images that come with the package, to try trained models on without a download.

Each is a file ``NAME.npz`` beside this one, with its license in ``NAME.LICENSE``: 512 images of
Fashion-MNIST, and 128 emoji (``scripts/prepare_emoji.py``). ``scripts/write_zoo.py`` writes them.
"""

from pathlib import Path

import numpy as np

from vmoe.data.sources.in_memory import InMemorySource, rgb
from vmoe.data.sources.splits import resolve_split

NAMES = ("fashion_mnist_sample", "emoji_sample")


def path_of(name: str) -> Path:
    """The file of a sample."""
    return Path(__file__).with_name(f"{name}.npz")


def open_sample(name: str, split: str) -> InMemorySource:
    """Opens a sample, which has test images only.

    Raises:
        UsageError: another split is asked for.
    """
    resolve_split(split, ["test"], name)
    with np.load(path_of(name), allow_pickle=False) as arrays:
        pixels, labels = arrays["images"], arrays["labels"].astype(np.int64)
        class_names = tuple(arrays["class_names"].tolist())
    images = rgb(pixels) if pixels.ndim == 3 else pixels
    return InMemorySource(f"{name}:test", (name, "test"), images, labels, class_names)
