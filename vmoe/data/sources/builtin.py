"""Data sets that come with packages, and synthetic images.

digits       1,797 handwritten digits of 8 x 8 pixels that scikit-learn ships: the test set of the
             UCI ML repository's optical digits. scikit-learn does not split them; here they are
             split by class, always in the same way: 70% train (1,257), 10% validation (180) and
             20% test (360).
NAME_sample  test images to try trained models without a download: 512 of Fashion-MNIST, and 128
             emoji (``scripts/prepare/emoji.py``). Their files and licenses are next to this module;
             ``scripts/maintain/zoo.py`` writes them.
synthetic:ITEMS[:SIZE[:CLASSES]]
             to try a run without data. SIZE pixels on each side (default 224), CLASSES (1,000).
             An image is a JPEG file of random coarse colors. Its class is its index modulo
             CLASSES; the names of the classes are their numbers. Training has ITEMS images;
             validation and test each have a tenth as many, and share none with training.
"""

import dataclasses
import functools
import io
from pathlib import Path

import numpy as np
from jaxtyping import Int
from PIL import Image

from vmoe.data.sources.arrays import Arrays, ArraySource, rgb
from vmoe.data.sources.source import BaseSource, Example, Fingerprint, digest
from vmoe.data.sources.splits import SPLITS, resolve_split
from vmoe.errors import UsageError

SIZE, CLASSES = 224, 1000
LARGEST, MOST_CLASSES, MOST_ITEMS = 4096, 1_000_000, 10**15
COARSE = 8  # random colors along each side of a synthetic image


def open_digits(name: str, split: str) -> ArraySource:
    """Opens a split of the digits."""
    return ArraySource(_digits, f"{name}:{split}", split)


@functools.cache
def _digits(name: str, split: str) -> Arrays:
    from sklearn.datasets import load_digits
    from sklearn.model_selection import train_test_split

    digits = load_digits()
    rest, test = train_test_split(
        np.arange(len(digits.target)), test_size=360, random_state=0, stratify=digits.target
    )
    train, validation = train_test_split(
        rest, test_size=180, random_state=0, stratify=digits.target[rest]
    )
    index = {"train": train, "validation": validation, "test": test}[split]
    gray = np.round(digits.images[index] * (255 / 16)).astype(np.uint8)
    return name, rgb(gray), digits.target[index], tuple(map(str, digits.target_names)), None


def open_sample(name: str, split: str) -> ArraySource:
    """Opens test images that come with the package."""
    resolve_split(split, ["test"], name)
    return SampleSource(_sample, name)


class SampleSource(ArraySource):
    """A sample, whose file also has the groups of its images if they are not independent."""

    @functools.cached_property
    def groups(self) -> Int[np.ndarray, "b"] | None:
        with np.load(path_of(self.name.removesuffix(":test")), allow_pickle=False) as arrays:
            return arrays["groups"].astype(np.int64) if "groups" in arrays else None


def _sample(name: str) -> Arrays:
    with np.load(path_of(name), allow_pickle=False) as arrays:
        pixels, labels = arrays["images"], arrays["labels"].astype(np.int64)
        class_names = tuple(arrays["class_names"].tolist())
    return f"{name}:test", rgb(pixels) if pixels.ndim == 3 else pixels, labels, class_names, None


def path_of(name: str) -> Path:
    """The file of a sample."""
    return Path(__file__).with_name(f"{name}.npz")


@dataclasses.dataclass(frozen=True)
class SyntheticSource(BaseSource):
    """A split of a synthetic data set.

    Attributes:
        items: number of images.
        size: side of an image, in pixels.
        classes: number of classes.
        split: an index into SPLITS.
    """

    name: str
    items: int
    size: int
    classes: int
    split: int

    @property
    def class_names(self) -> tuple[str, ...]:
        return tuple(map(str, range(self.classes)))

    @property
    def max_labels(self) -> int:
        return 1

    def __len__(self) -> int:
        return self.items

    def __getitem__(self, index: int) -> Example:
        rng = np.random.default_rng((self.split, range(len(self))[index]))
        coarse = rng.integers(0, 256, (COARSE, COARSE, 3), dtype=np.uint8)
        image = Image.fromarray(coarse).resize((self.size, self.size), Image.Resampling.BILINEAR)
        file = io.BytesIO()
        image.save(file, "jpeg")
        return Example(file.getvalue(), self.labels_of(index), f"{self.name}[{index}]")

    def labels_of(self, index: int) -> tuple[int, ...]:
        return (index % self.classes,)

    def fingerprint(self) -> Fingerprint:
        """A hash of the settings from which the images are computed."""
        return Fingerprint(digest(self), "", "")


def open_synthetic(numbers: str, split: str) -> SyntheticSource:
    """Opens a split of synthetic images, from ITEMS[:SIZE[:CLASSES]]."""
    place = f"synthetic:{numbers}"
    words = numbers.split(":")
    if len(words) > 3 or not all(word.isdecimal() for word in words):
        raise UsageError(f"{place}: give synthetic:ITEMS[:SIZE[:CLASSES]], whole numbers")
    items, size, classes = [int(word) for word in words] + [SIZE, CLASSES][len(words) - 1 :]
    for name, value, fewest, most in (
        ("ITEMS", items, 10, MOST_ITEMS),
        ("SIZE", size, 1, LARGEST),
        ("CLASSES", classes, 1, MOST_CLASSES),
    ):
        if not fewest <= value <= most:
            raise UsageError(f"{place}: {name} is {value}; use {fewest} to {most:,}")
    part = items if split == "train" else items // 10
    return SyntheticSource(f"{place}:{split}", part, size, classes, SPLITS.index(split))
