"""A source whose pixels are held in memory."""

import dataclasses
import hashlib
from collections.abc import Callable

import numpy as np
from jaxtyping import Int, UInt8

from vmoe.data.sources.source import Example, Fingerprint, Skipped, Source, sampled


@dataclasses.dataclass(frozen=True, eq=False)
class InMemorySource:
    """A split of a data set that is small enough for memory; see ``Source``.

    Attributes:
        opened_as: the arguments with which ``open_source`` opens it; its pickle holds only these.
    """

    name: str
    opened_as: tuple[str, str]
    images: UInt8[np.ndarray, "b h w 3"] = dataclasses.field(repr=False)
    labels: Int[np.ndarray, "b"] = dataclasses.field(repr=False)
    class_names: tuple[str, ...]

    @property
    def skipped(self) -> Skipped:
        """Nothing: there are no files to skip."""
        return Skipped()

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, index: int) -> Example:
        return Example(self.images[index], int(self.labels[index]), f"{self.name}[{index}]")

    def fingerprint(self) -> Fingerprint:
        """Hashes of the class names, labels and shape, and of the pixels of some images."""
        data = hashlib.sha256(repr((self.class_names, self.images.shape)).encode())
        data.update(self.labels.tobytes())
        content = hashlib.sha256()
        for i in sampled(len(self)):
            content.update(np.ascontiguousarray(self.images[i]).data)
        return Fingerprint(data.hexdigest(), "", content.hexdigest())

    def __reduce__(self) -> tuple[Callable[[str, str], Source], tuple[str, str]]:
        from vmoe.data.sources import open_source  # that module imports this one

        return open_source, self.opened_as


def rgb(grey: UInt8[np.ndarray, "b h w"]) -> UInt8[np.ndarray, "b h w 3"]:
    """Grey images with three equal channels, as a read-only view: the pixels are not copied."""
    return np.broadcast_to(grey[..., None], (*grey.shape, 3))
