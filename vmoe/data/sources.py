"""Where images come from: a name to examples that can be read in any order."""

import dataclasses
import functools
from collections.abc import Callable

import numpy as np
from jaxtyping import Int, UInt8

from vmoe.config import UsageError, unknown

SPLITS = ("train", "validation", "test")


@dataclasses.dataclass(frozen=True)
class Example:
    """One labelled image; pixels in [0, 255]."""

    image: UInt8[np.ndarray, "h w 3"]
    label: int


@dataclasses.dataclass(frozen=True, eq=False)
class Source:
    """One split of a data set, in memory; ``source[i]`` is an Example."""

    name: str
    images: UInt8[np.ndarray, "b h w 3"]
    labels: Int[np.ndarray, "b"]
    class_names: tuple[str, ...]

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, i: int) -> Example:
        return Example(self.images[i], int(self.labels[i]))


def open_source(name: str, split: str) -> Source:
    """A split of a named data set.

    Args:
        name: "digits".
        split: "train", "validation" or "test".

    Raises:
        UsageError: no such data set or split.
    """
    for what, given, known in (("data set", name, list(_SETS)), ("split", split, list(SPLITS))):
        if given not in known:
            raise UsageError(unknown(f"no {what}", given, known))
    return _SETS[name](split)


@functools.cache
def _digits(split: str) -> Source:
    """The 1,797 digits of 8 x 8 pixels that scikit-learn ships (UCI ML repository, test part).

    They come without a split: ours is stratified by class and fixed, 70% train (1,257),
    10% validation (180), 20% test (360).
    """
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
    grey = np.round(digits.images[index] * (255 / 16)).astype(np.uint8)
    names = tuple(str(name) for name in digits.target_names)
    return Source(f"digits:{split}", np.repeat(grey[..., None], 3, -1), digits.target[index], names)


_SETS: dict[str, Callable[[str], Source]] = {"digits": _digits}
