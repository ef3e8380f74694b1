"""Splits of a data set: the stored ones, and splits that are made here."""

import hashlib
import os
from collections.abc import Callable, Iterable, Mapping, Sequence

import numpy as np
from jaxtyping import Int, Int8, Integer, UInt64

from vmoe.data.sources.index import parts
from vmoe.errors import UsageError, unknown

SPLITS = ("train", "validation", "test")
WORDS = {  # stored names of splits, in lower case -> split
    "train": "train",
    "training": "train",
    "validation": "validation",
    "val": "validation",
    "valid": "validation",
    "dev": "validation",
    "eval": "validation",
    "test": "test",
    "testing": "test",
}


class NoSplit(UsageError):
    """A data set does not have a split.

    Attributes:
        available: the names of its splits.
    """

    available: tuple[str, ...] = ()


def no_split(location: str, split: str, available: Iterable[str]) -> NoSplit:
    """The error for a split that a data set does not have."""
    error = NoSplit(unknown(f"{location} has no split", split, list(available)))
    error.available = tuple(available)
    return error


def named_splits(names: Iterable[str], place: str) -> dict[str, str]:
    """The names of the splits in a data set.

    Args:
        names: names of the data set's parts; names that are not known for a split are ignored.
        place: the data set, for error messages.

    Returns:
        the name of each split that has one, in the order of SPLITS.

    >>> named_splits(["Test", "valid", "Train", "extra"], "photos")
    {'train': 'Train', 'validation': 'valid', 'test': 'Test'}
    """
    found = dict[str, str]()
    for name in names:
        split = WORDS.get(name.lower())
        if split in found:
            raise UsageError(
                f"{place}: {found[split]!r} and {name!r} are both {split}; rename or remove one"
            )
        if split:
            found[split] = name
    return {split: found[split] for split in SPLITS if split in found}


def resolve_split(split: str, available: Sequence[str], place: str) -> tuple[str, dict[str, float]]:
    """The stored part that holds the images of a split.

    Args:
        split: the split to open.
        available: the names of the stored parts; empty if the data set is not split.

    Returns:
        the name of the part to read, "" for a data set that is not split; and the fractions to
        split off for other splits, see ``stratified_split``.
    """
    if not available:
        return "", {"validation": 0.1, "test": 0.1}
    named = named_splits(available, place)
    if split in ("train", "validation") and "train" in named and "validation" not in named:
        return named["train"], {"validation": 0.1}
    if split not in named:
        raise no_split(place, split, available)
    return named[split], {}


def stratified_split(
    labels: Integer[np.ndarray, "b"],
    fractions: Mapping[str, float],
    *,
    class_names: Sequence[str],
    place: str,
) -> dict[str, Int[np.ndarray, "x"]]:
    """Splits a data set so that every split has the same fraction of each class.

    The images of each class are shuffled, always in the same way. Each split gets its fraction of
    them, at least one; "train" gets the rest.

    Args:
        fractions: the fraction of each class, in (0, 1), for each split but "train".
        class_names: the names of the classes, in the order of the labels.

    Returns:
        the indices of the images of each split, in ascending order.
    """
    chunks: dict[str, list[np.ndarray]] = {split: [] for split in (*fractions, "train")}
    by_class = np.argsort(labels, kind="stable")
    bounds = np.searchsorted(labels, np.arange(len(class_names) + 1), sorter=by_class)
    for label, class_name in enumerate(class_names):
        of_class = by_class[bounds[label] : bounds[label + 1]]
        members = np.random.default_rng(label).permutation(of_class)
        _require_one_each(class_name, len(members), fractions, place)
        start = 0
        for split, fraction in fractions.items():
            count = max(1, round(fraction * len(members)))
            chunks[split].append(members[start : start + count])
            start += count
        chunks["train"].append(members[start:])
    return {split: np.sort(np.concatenate(indices)) for split, indices in chunks.items()}


def name_hashes(names: Sequence[str]) -> UInt64[np.ndarray, "x"]:
    """A number in [0, 2^64) for each name, which depends on the name alone."""
    digests = b"".join(
        hashlib.sha256(os.fsencode(name.replace(os.sep, "/"))).digest()[:8] for name in names
    )
    return np.frombuffer(digests, ">u8").astype(np.uint64)


def hashed_split(
    hashes: UInt64[np.ndarray, "x"], fractions: Mapping[str, float]
) -> Int8[np.ndarray, "x"]:
    """Splits images by the hashes of their names: adding or removing an image moves no other.

    Args:
        hashes: from ``name_hashes``.
        fractions: average fraction of the images, in (0, 1), for each split but "train".

    Returns:
        the split of each image, as an index into the keys of ``fractions``; "train" is the last.
    """
    bounds = np.cumsum(list(fractions.values()))
    return np.searchsorted(bounds, (hashes >> np.uint64(16)) / 2**48, "right").astype(np.int8)


def give_every_split_one(
    chosen: Int8[np.ndarray, "b"],
    hashes_of: Callable[[Iterable[int]], UInt64[np.ndarray, "_"]],
    labels: Int[np.ndarray, "b"],
    fractions: Mapping[str, float],
    *,
    class_names: Sequence[str],
    place: str,
) -> None:
    """Gives every split an image of every class that has images.

    A split without an image of a class takes the image of this class with the smallest hash.

    Args:
        chosen: from ``hashed_split``; changed in place. Larger numbers are other splits, whose
            images are left as they are.
        hashes_of: returns the hashes of the names of the images at some indices.
        labels: the class of each image.
    """
    splits = len(fractions) + 1
    counts = np.zeros((len(class_names), splits), np.int64)
    for part in parts(len(chosen)):
        own = chosen[part] < splits
        np.add.at(counts, (labels[part][own], chosen[part][own]), 1)
    used = counts.any(1)
    for label in np.flatnonzero(used).tolist():
        _require_one_each(class_names[label], int(counts[label].sum()), fractions, place)
    lacking = used & (counts == 0).any(1)
    few = np.concatenate(
        [
            part.start + np.flatnonzero(lacking[labels[part]] & (chosen[part] < splits))
            for part in parts(len(chosen))
        ]
    )
    for label in np.flatnonzero(lacking):
        members = few[labels[few] == label]
        members = members[np.argsort(hashes_of(members.tolist()))]
        for split in range(splits):
            now = np.bincount(chosen[members], minlength=splits)
            if not now[split]:
                chosen[members[now[chosen[members]] > 1][0]] = split


def _require_one_each(
    class_name: str, count: int, fractions: Mapping[str, float], place: str
) -> None:
    if count <= len(fractions):
        others = " and ".join(fractions)
        raise UsageError(
            f"{place}: class {class_name!r} has {count} images, too few to split off {others}: add "
            f"images, or provide {others} separately"
        )
