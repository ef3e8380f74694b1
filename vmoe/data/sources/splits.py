"""Splits of a data set: those that it comes with, and those that are split off here."""

import hashlib
import os
from collections.abc import Mapping, Sequence

import numpy as np
from jaxtyping import Int

from vmoe.errors import UsageError, unknown

SPLITS = ("train", "validation", "test")


def resolve_split(split: str, available: Sequence[str], place: str) -> tuple[str, dict[str, float]]:
    """The stored split that holds the images of a split.

    Args:
        split: the split to open.
        available: the splits that the data set comes with; empty if it is not split.
        place: the data set, for error messages.

    Returns:
        the available split to read, "" for a data set that is not split; and the fractions to
        split off for other splits, see ``stratified_split``.

    Raises:
        UsageError: the split is not available and cannot be split off another.
    """
    if not available:
        return "", {"validation": 0.1, "test": 0.1}
    if split in ("train", "validation") and "train" in available and "validation" not in available:
        return "train", {"validation": 0.1}
    if split not in available:
        raise UsageError(unknown(f"{place} has no split", split, list(available)))
    return split, {}


def stratified_split(
    labels: Int[np.ndarray, "b"],
    fractions: Mapping[str, float],
    *,
    class_names: Sequence[str],
    place: str,
) -> dict[str, Int[np.ndarray, "x"]]:
    """Splits a data set so that every split has the same fraction of each class.

    The images of each class are shuffled, always in the same way. Each split gets its fraction of
    them, at least one; "train" gets the rest.

    Args:
        labels: the class of each image.
        fractions: by split other than "train", the fraction of each class, in (0, 1).
        class_names: the names of the classes, in the order of the labels.
        place: the data set, for error messages.

    Returns:
        by split, the indices of its images in ascending order.

    Raises:
        UsageError: a class has too few images for every split to get one.
    """
    chunks: dict[str, list[np.ndarray]] = {split: [] for split in (*fractions, "train")}
    for label, class_name in enumerate(class_names):
        members = np.random.default_rng(label).permutation(np.flatnonzero(labels == label))
        _require_one_each(class_name, len(members), fractions, place)
        start = 0
        for split, fraction in fractions.items():
            count = max(1, round(fraction * len(members)))
            chunks[split].append(members[start : start + count])
            start += count
        chunks["train"].append(members[start:])
    return {split: np.sort(np.concatenate(indices)) for split, indices in chunks.items()}


def hashed_split(
    files: Sequence[str],
    labels: Int[np.ndarray, "b"],
    fractions: Mapping[str, float],
    *,
    class_names: Sequence[str],
    place: str,
) -> dict[str, Int[np.ndarray, "x"]]:
    """Splits a data set by a hash of each name, so that adding or removing one moves no other.

    A split of a class that would be empty takes the image of the class with the smallest hash.

    Otherwise as ``stratified_split``, but a split gets its fraction only on average.

    Args:
        files: the name of each image, with its class.
    """
    hashes = np.array([_hash(file) for file in files])
    bounds = np.cumsum(list(fractions.values()))
    names = [*fractions, "train"]
    chosen = np.searchsorted(bounds, hashes, side="right")
    for label, class_name in enumerate(class_names):
        members = np.flatnonzero(labels == label)
        members = members[np.argsort(hashes[members])]
        _require_one_each(class_name, len(members), fractions, place)
        for split in range(len(names)):
            counts = np.bincount(chosen[members], minlength=len(names))
            if not counts[split]:
                spare = members[counts[chosen[members]] > 1]
                chosen[spare[0]] = split
    return {name: np.flatnonzero(chosen == i) for i, name in enumerate(names)}


def _require_one_each(
    class_name: str, count: int, fractions: Mapping[str, float], place: str
) -> None:
    if count <= len(fractions):
        others = " and ".join(fractions)
        raise UsageError(
            f"{place}: class {class_name!r} has {count} images, too few to split off {others}: add "
            f"images, or provide {others} separately"
        )


def _hash(file: str) -> float:
    """A number in [0, 1) that depends only on the name."""
    digest = hashlib.sha256(os.fsencode(file.replace(os.sep, "/"))).digest()
    return int.from_bytes(digest[:6], "big") / 2**48
