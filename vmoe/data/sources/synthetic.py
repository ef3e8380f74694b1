"""Images computed from their index, to try a run without data.

    synthetic:ITEMS[:SIZE[:CLASSES]]    SIZE pixels on each side (default 224), CLASSES (1,000)

An image is a JPEG file of random coarse colours. Its class is its index modulo CLASSES; the classes
have their numbers as names. Training has ITEMS images; validation and test have a tenth of that, of
their own.
"""

import dataclasses
import hashlib
import io

import numpy as np
from PIL import Image

from vmoe.data.sources.source import Example, Fingerprint, Skipped
from vmoe.data.sources.splits import SPLITS
from vmoe.errors import UsageError

SIZE, CLASSES = 224, 1000
LARGEST, MOST_CLASSES, MOST_ITEMS = 4096, 1_000_000, 10**15
COARSE = 8  # random colours along each side of an image


@dataclasses.dataclass(frozen=True)
class SyntheticSource:
    """A split of a synthetic data set; see ``Source``.

    Attributes:
        items: number of images.
        size: of an image, in pixels.
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
    def skipped(self) -> Skipped:
        """Nothing is skipped."""
        return Skipped()

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
        """A hash of what the images are computed from."""
        return Fingerprint(hashlib.sha256(repr(self).encode()).hexdigest(), "", "")


def open_synthetic(numbers: str, split: str) -> SyntheticSource:
    """Opens a split of synthetic images.

    Args:
        numbers: ITEMS[:SIZE[:CLASSES]].
        split: "train", "validation" or "test".

    Raises:
        UsageError: a number is missing or out of range.
    """
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
