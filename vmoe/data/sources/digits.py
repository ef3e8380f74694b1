"""The 1,797 handwritten digits of 8 x 8 pixels that scikit-learn ships.

They are the test part of the UCI ML repository's, and come without a split: ours is stratified by
class and fixed, 70% train (1,257), 10% validation (180), 20% test (360).
"""

import functools

import numpy as np

from vmoe.data.sources.source import Source, rgb


@functools.cache
def open_digits(split: str) -> Source:
    """A split of the digits."""
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
    return Source(f"digits:{split}", rgb(grey), digits.target[index], names)
