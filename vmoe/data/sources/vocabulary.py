"""Converts labels as stored in a file, names or numbers of classes, to indices of classes.

If all labels of a data set are whole numbers, they are the numbers of the classes, from 0. Else
they are names, and the classes are in the order of their names. A file ``classes.txt`` in the
folder of the data, with a name per line, fixes names, order and number of classes for both kinds.
"""

import re
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Int

from vmoe.errors import UsageError, shortened, unknown
from vmoe.host.retry import read_regular, retried

CLASSES = "classes.txt"
MOST_DIGITS = 18  # of a label that fits into 64 bits
MOST_CLASSES = 1_000_000  # a larger label is an identifier, not the number of a class


class Vocabulary:
    """Numbers labels in the order of their appearance, until all of them are known."""

    def __init__(self) -> None:
        self._numbers: dict[str, int] = {}

    @property
    def words(self) -> list[str]:
        """The labels, in the order of their numbers."""
        return list(self._numbers)

    def numbers(self, labels: Iterable[str]) -> list[int]:
        """The provisional numbers of some labels."""
        return [self._numbers.setdefault(label, len(self._numbers)) for label in labels]

    def resolve(
        self, given: tuple[str, ...] | None, place: str
    ) -> tuple[tuple[str, ...], Int[np.ndarray, "x"]]:
        """The class names, and the class of each provisional number.

        Args:
            given: the class names of ``classes.txt``, if there is one.
        """
        words = self.words
        if all(re.fullmatch(r"-?\d+", word, re.ASCII) for word in words):
            for word in words:
                if len(word) > MOST_DIGITS:
                    label = shortened(word, 40)
                    raise UsageError(f"{place}: label {label}; number the classes from 0")
            classes = np.array(words, np.int64)
            if classes.min(initial=0) < 0:
                raise UsageError(
                    f"{place}: label {classes.min()} is below 0; number the classes from 0, and "
                    "leave out the label of an image without a class"
                )
            return names_of(int(classes.max(initial=-1)), given, CLASSES, place), classes
        names = given or tuple(sorted(words))
        position = {name: i for i, name in enumerate(names)}
        for word in words:
            if word not in position:
                raise UsageError(unknown(f"{place}: {CLASSES} has no class", word, list(names)))
        return names, np.array([position[word] for word in words], np.int64)


def names_of(largest: int, given: Sequence[str] | None, holder: str, place: str) -> tuple[str, ...]:
    """The names of the classes that labels number; by default the numbers.

    Args:
        largest: the largest label; -1 if there are none.
        holder: where the names come from, for error messages.
    """
    if given is None and largest >= MOST_CLASSES:
        raise UsageError(f"{place}: label {largest}; number the classes from 0")
    if given is not None and largest >= len(given):
        raise UsageError(
            f"{place}: label {largest} has no name; {holder} holds {len(given)}, for labels from 0"
        )
    return tuple(map(str, range(largest + 1)) if given is None else given)


def labels_of_json(value: Any, where: str) -> list[str]:
    """The labels in a JSON value: a whole number, a name, or a list of these."""
    labels = value if isinstance(value, list) else [value]
    for label in labels:
        if isinstance(label, bool) or not isinstance(label, int | str) or label == "":
            shown = shortened(repr(label), 40)
            raise UsageError(
                f"{where}: {shown} is not a label; give the number or the name of a class, or a "
                "list of these"
            )
    return list(dict.fromkeys(map(str, labels)))


def read_class_names(folder: Path) -> tuple[str, ...] | None:
    """The names in the file ``classes.txt`` of a folder; None if there is none."""
    path = folder / CLASSES
    try:
        text = retried(path, lambda: read_regular(path)).decode("utf-8-sig")
    except FileNotFoundError:
        return None
    except (OSError, UnicodeDecodeError) as error:
        raise UsageError(f"{path}: cannot be read ({error})") from None
    names = [line.strip() for line in text.removesuffix("\n").split("\n")]
    check_distinct(names, str(path))
    return tuple(names)


def check_distinct(names: Sequence[str], place: str) -> None:
    """Checks that there are class names, and that none is empty or occurs twice."""
    if not names or "" in names or len(set(names)) < len(names):
        raise UsageError(f"{place} is not a list of distinct names")
