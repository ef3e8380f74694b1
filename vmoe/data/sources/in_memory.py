"""A source whose pixels are held in memory."""

import dataclasses
import hashlib
from collections.abc import Callable

import numpy as np
from jaxtyping import Int, UInt8

from vmoe.data.sources.source import Example, Source

FINGERPRINT_IMAGES = 64  # number of images whose pixels are part of a fingerprint


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
    def skipped(self) -> int:
        """Always 0: there are no files to skip."""
        return 0

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, index: int) -> Example:
        return Example(self.images[index], int(self.labels[index]), f"{self.name}[{index}]")

    def fingerprint(self) -> str:
        """A hash of the class names, the labels, the shape of the images, and some of the pixels.

        It includes the pixels of ``FINGERPRINT_IMAGES`` evenly spaced images, or of all if there
        are fewer. It does not detect changes in the pixels of other images.
        """
        digest = hashlib.sha256(repr((self.class_names, self.images.shape)).encode())
        digest.update(self.labels.tobytes())
        count = min(len(self), FINGERPRINT_IMAGES)
        for i in np.arange(count) * len(self) // count:
            digest.update(np.ascontiguousarray(self.images[i]).data)
        return digest.hexdigest()

    def __reduce__(self) -> tuple[Callable[[str, str], Source], tuple[str, str]]:
        from vmoe.data.sources import open_source  # that module imports this one

        return open_source, self.opened_as


def rgb(grey: UInt8[np.ndarray, "b h w"]) -> UInt8[np.ndarray, "b h w 3"]:
    """Grey images with three equal channels, as a read-only view: the pixels are not copied."""
    return np.broadcast_to(grey[..., None], (*grey.shape, 3))
