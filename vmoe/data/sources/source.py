"""The interface of a data set: labelled images with random access."""

import dataclasses
from typing import Protocol, runtime_checkable

import numpy as np
from jaxtyping import UInt8


@dataclasses.dataclass(frozen=True)
class Example:
    """One labelled image.

    Attributes:
        image: the bytes of an image file, or RGB pixels in [0, 255].
        label: the class, an index into ``Source.class_names``.
        origin: where the image comes from, for error messages: a path, or "digits:train[3]".
    """

    image: bytes | UInt8[np.ndarray, "h w 3"]
    label: int
    origin: str


@runtime_checkable
class Source(Protocol):
    """One split of a data set.

    A source can be pickled, and its pickle holds no pixels: worker processes open the data
    themselves.
    """

    @property
    def name(self) -> str:
        """The data set and the split, such as "digits:train"."""

    @property
    def class_names(self) -> tuple[str, ...]:
        """The names of the classes, in the order of the labels."""

    @property
    def skipped(self) -> int:
        """The number of files that are left out because they are not images."""

    def __len__(self) -> int:
        """The number of examples."""

    def __getitem__(self, index: int) -> Example:
        """The example at an index in [0, len).

        Raises:
            UsageError: its file cannot be read.
        """

    def fingerprint(self) -> str:
        """A hash of the data, to compare it with that of an earlier run.

        It is cheap to compute, so it does not cover every pixel; implementations document what they
        leave out.
        """
