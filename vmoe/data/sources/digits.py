"""The 1,797 handwritten digits of 8 x 8 pixels that scikit-learn ships.

They are the test set of the UCI ML repository's optical digits. scikit-learn does not split them;
here they are split by class, always in the same way: 70% train (1,257), 10% validation (180) and
20% test (360).
"""

import functools

import numpy as np

from vmoe.data.sources.in_memory import InMemorySource, rgb


@functools.cache
def open_digits(split: str) -> InMemorySource:
    """Opens a split of the digits.

    Args:
        split: "train", "validation" or "test".
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
    class_names = tuple(str(name) for name in digits.target_names)
    return InMemorySource(
        f"digits:{split}", ("digits", split), rgb(grey), digits.target[index], class_names
    )
