"""A source whose pixels are an array, in memory or mapped into it."""

import dataclasses
import functools
import hashlib
from collections.abc import Callable

import numpy as np
from jaxtyping import Int, UInt8

from vmoe.data.sources.source import Example, Fingerprint, Skipped, Source, sampled


@dataclasses.dataclass(frozen=True, eq=False)
class InMemorySource:
    """A split of a data set that is one array; see ``Source``.

    Attributes:
        opened_as: the arguments with which ``open_source`` opens it; its pickle holds only these.
        labels: of each example: one, or several padded with -1.
        rows: where the images of the examples are among ``images``, if these are not all.
    """

    name: str
    opened_as: tuple[str, str]
    images: UInt8[np.ndarray, "_ h w 3"] = dataclasses.field(repr=False)
    labels: Int[np.ndarray, "b"] | Int[np.ndarray, "b l"] = dataclasses.field(repr=False)
    class_names: tuple[str, ...]
    rows: Int[np.ndarray, "b"] | None = dataclasses.field(default=None, repr=False)

    @property
    def skipped(self) -> Skipped:
        """Nothing: there are no files to skip."""
        return Skipped()

    @functools.cached_property
    def max_labels(self) -> int:
        return 1 if self.labels.ndim == 1 else max(1, int((self.labels >= 0).sum(1).max()))

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, index: int) -> Example:
        return Example(self._pixels(index), self.labels_of(index), f"{self.name}[{index}]")

    def _pixels(self, index: int) -> UInt8[np.ndarray, "h w 3"]:
        return np.asarray(self.images[index if self.rows is None else self.rows[index]])

    def labels_of(self, index: int) -> tuple[int, ...]:
        return tuple(label for label in np.atleast_1d(self.labels[index]).tolist() if label >= 0)

    def fingerprint(self) -> Fingerprint:
        """Hashes of the class names, labels and shape, and of the pixels of some images."""
        shape = (len(self), *self.images.shape[1:])
        data = hashlib.sha256(repr((self.class_names, shape)).encode())
        data.update(self.labels.tobytes())
        content = hashlib.sha256()
        for i in sampled(len(self)):
            content.update(np.ascontiguousarray(self._pixels(i)).data)
        return Fingerprint(data.hexdigest(), "", content.hexdigest())

    def __reduce__(self) -> tuple[Callable[[str, str], Source], tuple[str, str]]:
        from vmoe.data.sources import open_source  # that module imports this one

        return open_source, self.opened_as


def rgb(grey: UInt8[np.ndarray, "b h w"]) -> UInt8[np.ndarray, "b h w 3"]:
    """Grey images with three equal channels, as a read-only view: the pixels are not copied."""
    return np.broadcast_to(grey[..., None], (*grey.shape, 3))
