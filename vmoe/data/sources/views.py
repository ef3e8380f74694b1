"""Views of another source: some of its images, or its images with other classes."""

import dataclasses
import hashlib
import re
from collections.abc import Sequence

import numpy as np
from jaxtyping import Int

from vmoe.class_names import NAMES, synsets
from vmoe.class_names import class_names as imagenet
from vmoe.data.sources.source import Example, Fingerprint, Skipped, Source, digest
from vmoe.errors import UsageError, unknown


@dataclasses.dataclass(frozen=True, eq=False)
class View:
    """A view of another source, equal to it unless a subclass differs."""

    source: Source

    @property
    def name(self) -> str:
        return self.source.name

    @property
    def class_names(self) -> tuple[str, ...]:
        return self.source.class_names

    @property
    def groups(self) -> Int[np.ndarray, "b"] | None:
        return getattr(self.source, "groups", None)

    @property
    def skipped(self) -> Skipped:
        return self.source.skipped

    @property
    def max_labels(self) -> int:
        return self.source.max_labels

    def __len__(self) -> int:
        return len(self.source)

    def __getitem__(self, index: int) -> Example:
        return self.source[index]

    def labels_of(self, index: int) -> tuple[int, ...]:
        return self.source.labels_of(index)

    def fingerprint(self) -> Fingerprint:
        return self.source.fingerprint()


@dataclasses.dataclass(frozen=True, eq=False)
class Subset(View):
    """Some examples of another source; see ``Source``.

    Attributes:
        indices: indices of the examples in the other source.
    """

    indices: Int[np.ndarray, "b"]

    @property
    def name(self) -> str:
        return f"{self.source.name}, {len(self):,} of {len(self.source):,} images"

    @property
    def groups(self) -> Int[np.ndarray, "b"] | None:
        return None if (groups := super().groups) is None else groups[self.indices]

    def __len__(self) -> int:
        return len(self.indices)

    def __getitem__(self, index: int) -> Example:
        return self.source[int(self.indices[index])]

    def labels_of(self, index: int) -> tuple[int, ...]:
        return self.source.labels_of(int(self.indices[index]))

    def fingerprint(self) -> Fingerprint:
        """The other source's fingerprint, with the indices."""
        fingerprint = self.source.fingerprint()
        data = hashlib.sha256(fingerprint.data.encode() + self.indices.tobytes())
        return fingerprint._replace(data=data.hexdigest())


def sample(source: Source, count: int) -> Source:
    """At most ``count`` random images, always the same, in the order of the source.

    Returns:
        the source itself if it has no more images.
    """
    if len(source) <= count:
        return source
    chosen = np.random.default_rng(0).choice(len(source), count, replace=False)
    return Subset(source, np.sort(chosen))


@dataclasses.dataclass(frozen=True, eq=False)
class Relabeled(View):
    """The examples of another source with other labels; see ``Source``.

    Attributes:
        new_labels: the label that replaces each label of the other source.
        names: names of the classes, in the order of the new labels.
    """

    new_labels: tuple[int, ...]
    names: tuple[str, ...]

    @property
    def class_names(self) -> tuple[str, ...]:
        return self.names

    def __getitem__(self, index: int) -> Example:
        example = self.source[index]
        return dataclasses.replace(example, labels=self._relabeled(example.labels))

    def labels_of(self, index: int) -> tuple[int, ...]:
        return self._relabeled(self.source.labels_of(index))

    def _relabeled(self, labels: tuple[int, ...]) -> tuple[int, ...]:
        return tuple(self.new_labels[label] for label in labels)

    def fingerprint(self) -> Fingerprint:
        """The other source's fingerprint, with the new class names and labels."""
        fingerprint = self.source.fingerprint()
        new = (fingerprint.data, self.new_labels, self.names)
        return fingerprint._replace(data=digest(new))


def relabel(source: Source, class_names: Sequence[str]) -> Source:
    """The same images, each labeled by the position of its class in ``class_names``.

    If ``class_names`` are ImageNet's, as names or synsets, the classes of the source may also be
    synsets, as in ImageNet's folders, or all the numbers, as in the folders of ImageNet-V2.

    Args:
        class_names: the classes of a model, in the order of its logits.

    Returns:
        the source itself if it already has these classes.

    Raises:
        UsageError: the source has a class that is not in ``class_names``.
    """
    if source.class_names == tuple(class_names):
        return source
    positions = _imagenet(source.class_names, tuple(class_names)) or {
        name: i for i, name in enumerate(class_names)
    }
    for name in source.class_names:
        if name not in positions:
            what = f"{source.name} has a class that the model was not trained on,"
            raise UsageError(unknown(what, name, list(class_names)))
    new_labels = tuple(positions[name] for name in source.class_names)
    return Relabeled(source, new_labels, tuple(class_names))


def _imagenet(names: tuple[str, ...], class_names: tuple[str, ...]) -> dict[str, int] | None:
    """The positions of ImageNet's classes by synset or number, if the names are these."""
    for known in NAMES:
        if class_names in (imagenet(known), synsets(known)):
            if all(re.fullmatch(r"n\d{8}", name) for name in names):
                return {synset: i for i, synset in enumerate(synsets(known))}
            # Fewer numbers may name any classes, such as digits.
            numbers = {str(i): i for i in range(len(class_names))}
            return numbers if set(names) == numbers.keys() else None
    return None
