"""A source whose pixels are an array, in memory or mapped into it."""

import dataclasses
import functools
import hashlib
from collections.abc import Callable, Iterator

import numpy as np
from jaxtyping import Int, Integer, UInt8

from vmoe.data.sources.index import CHUNK
from vmoe.data.sources.source import Example, Fingerprint, Skipped, Source, sampled


@dataclasses.dataclass(frozen=True, eq=False)
class InMemorySource:
    """A split of a data set that is one array; see ``Source``.

    Attributes:
        opened_as: the arguments with which ``open_source`` opens it; its pickle holds only these.
        labels: of each image: one, or several padded with -1; of any integer type.
        rows: where the examples are among ``images`` and ``labels``, if these are not all.
    """

    name: str
    opened_as: tuple[str, str]
    images: UInt8[np.ndarray, "_ h w 3"] = dataclasses.field(repr=False)
    labels: Integer[np.ndarray, "_"] | Integer[np.ndarray, "_ l"] = dataclasses.field(repr=False)
    class_names: tuple[str, ...]
    rows: Int[np.ndarray, "b"] | None = dataclasses.field(default=None, repr=False)

    @property
    def skipped(self) -> Skipped:
        """Nothing: there are no files to skip."""
        return Skipped()

    @functools.cached_property
    def max_labels(self) -> int:
        if self.labels.ndim == 1:
            return 1
        return max([1, *(int((labels >= 0).sum(1).max()) for labels in self._label_chunks())])

    def __len__(self) -> int:
        return len(self.labels if self.rows is None else self.rows)

    def __getitem__(self, index: int) -> Example:
        return Example(self._pixels(index), self.labels_of(index), f"{self.name}[{index}]")

    def _pixels(self, index: int) -> UInt8[np.ndarray, "h w 3"]:
        return np.asarray(self.images[self._row(index)])

    def _row(self, index: int) -> int:
        return index if self.rows is None else int(self.rows[index])

    def labels_of(self, index: int) -> tuple[int, ...]:
        labels = np.atleast_1d(self.labels[self._row(index)])
        return tuple(label for label in labels.tolist() if label >= 0)

    def _label_chunks(self) -> Iterator[np.ndarray]:
        """The labels of all examples, a part at a time: mapped ones are not copied as a whole."""
        for start in range(0, len(self), CHUNK):
            rows = slice(start, start + CHUNK)
            yield self.labels[rows if self.rows is None else self.rows[rows]]

    def fingerprint(self) -> Fingerprint:
        """Hashes of the class names, labels and shape, and of the pixels of some images."""
        shape = (len(self), *self.images.shape[1:])
        data = hashlib.sha256(repr((self.class_names, shape)).encode())
        for labels in self._label_chunks():
            data.update(labels.astype(np.int64).tobytes())
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
