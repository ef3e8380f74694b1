"""Some images of a source."""

import dataclasses
import hashlib

import numpy as np
from jaxtyping import Int

from vmoe.data.sources.source import Example, Fingerprint, Skipped, Source


@dataclasses.dataclass(frozen=True, eq=False)
class Subset:
    """Some examples of another source; see ``Source``.

    Attributes:
        indices: of the examples in the other source.
    """

    source: Source
    indices: Int[np.ndarray, "b"]

    @property
    def name(self) -> str:
        return f"{self.source.name}, {len(self):,} of {len(self.source):,} images"

    @property
    def class_names(self) -> tuple[str, ...]:
        return self.source.class_names

    @property
    def skipped(self) -> Skipped:
        return self.source.skipped

    @property
    def max_labels(self) -> int:
        return self.source.max_labels

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
        the source itself if it has no more.
    """
    if len(source) <= count:
        return source
    chosen = np.random.default_rng(0).choice(len(source), count, replace=False)
    return Subset(source, np.sort(chosen))
