"""What every data set is to the rest: labelled images that can be read in any order."""

import dataclasses
import hashlib
from collections.abc import Sequence

import numpy as np
from jaxtyping import Int, UInt8

from vmoe.data.decode import read_image
from vmoe.errors import UsageError, unknown

SPLITS = ("train", "validation", "test")


@dataclasses.dataclass(frozen=True)
class Example:
    """One labelled image; pixels in [0, 255]."""

    image: UInt8[np.ndarray, "h w 3"]
    label: int


@dataclasses.dataclass(frozen=True)
class Files:
    """Image files as a sequence of pixels: each is read when it is asked for."""

    paths: tuple[str, ...]

    def __getitem__(self, i: int) -> UInt8[np.ndarray, "h w 3"]:
        return read_image(self.paths[i])


@dataclasses.dataclass(frozen=True, eq=False)
class Source:
    """One split of a data set; ``source[i]`` is an Example."""

    name: str
    images: UInt8[np.ndarray, "b h w 3"] | Files
    labels: Int[np.ndarray, "b"]
    class_names: tuple[str, ...]
    skipped: int = 0
    """Files that were left out because they are no images."""

    def __len__(self) -> int:
        return len(self.labels)

    def fingerprint(self) -> str:
        """Changes with the classes, the labels, and the names of files or the pixels in memory."""
        digest = hashlib.sha256(repr(self.class_names).encode() + self.labels.tobytes())
        if isinstance(self.images, Files):
            names = ["/".join(path.rsplit("/", 2)[-2:]) for path in self.images.paths]
            digest.update(repr(names).encode())
        else:
            for image in self.images:
                digest.update(np.ascontiguousarray(image).data)
        return digest.hexdigest()

    def __getitem__(self, i: int) -> Example:
        return Example(self.images[i], int(self.labels[i]))


def rgb(grey: UInt8[np.ndarray, "b h w"]) -> UInt8[np.ndarray, "b h w 3"]:
    """Grey images as three equal channels, which share their memory."""
    return np.broadcast_to(grey[..., None], (*grey.shape, 3))


def part_of(split: str, own: Sequence[str], place: str) -> tuple[str, dict[str, float]]:
    """Where a split of a data set comes from.

    Args:
        split: that is asked for.
        own: the splits that the data set comes with; empty for one that comes in one piece.
        place: what to name in an error.

    Returns:
        the split to read, empty for the whole; and the shares to take out of it for others.

    Raises:
        UsageError: there is no such split and nothing to take it from.
    """
    if not own:
        return "", {"validation": 0.1, "test": 0.1}
    if split in ("train", "validation") and "train" in own and "validation" not in own:
        return "train", {"validation": 0.1}
    if split not in own:
        raise UsageError(f"{place} has no part {split!r}, there are {', '.join(own)}")
    return split, {}


def shares(
    labels: Int[np.ndarray, "b"], parts: dict[str, float], *, names: tuple[str, ...], place: str
) -> dict[str, Int[np.ndarray, "x"]]:
    """Which images form which part of a data set that comes in one piece.

    Of each class, its share in a random order that is always the same, at least one image for
    each part; what is left is "train".

    Args:
        labels: the class of each image.
        parts: the share of each part but "train".
        names: of the classes.
        place: what to name in an error.

    Raises:
        UsageError: a class has fewer images than there are parts.
    """
    found: dict[str, list[np.ndarray]] = {name: [] for name in (*parts, "train")}
    for label, class_name in enumerate(names):
        members = np.random.default_rng(label).permutation(np.flatnonzero(labels == label))
        if len(members) <= len(parts):
            raise UsageError(
                f"{place}: class {class_name!r} has {len(members)} images, too few to take some "
                f"out for {' and '.join(parts)}: add images, or give these parts of their own"
            )
        start = 0
        for part, share in parts.items():
            count = max(1, round(share * len(members)))
            found[part].append(members[start : start + count])
            start += count
        found["train"].append(members[start:])
    return {part: np.sort(np.concatenate(chunks)) for part, chunks in found.items()}


def relabel(source: Source, names: Sequence[str]) -> Source:
    """The same images, labelled by the place of their class among the names of a model.

    Raises:
        UsageError: the source has a class that is not among them.
    """
    if source.class_names == tuple(names):
        return source
    places = {name: i for i, name in enumerate(names)}
    strange = [name for name in source.class_names if name not in places]
    if strange:
        raise UsageError(
            unknown(
                f"{source.name} has a class that the model was not trained on,",
                strange[0],
                list(names),
            )
        )
    index = np.array([places[name] for name in source.class_names])
    return dataclasses.replace(source, labels=index[source.labels], class_names=tuple(names))
