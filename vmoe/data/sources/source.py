"""The interface of a data set (labeled images with random access), and a base class of sources."""

import dataclasses
import functools
import hashlib
from collections.abc import Callable
from typing import Any, NamedTuple, Protocol, runtime_checkable

import numpy as np
from jaxtyping import UInt8


@dataclasses.dataclass(frozen=True)
class Example:
    """One labeled image.

    Attributes:
        image: the bytes of an image file, or RGB pixels in [0, 255].
        labels: its classes, as indices into ``Source.class_names``; empty if it has none.
        origin: where the image comes from, for error messages: a path, or "digits:train[3]".
    """

    image: bytes | UInt8[np.ndarray, "h w 3"]
    labels: tuple[int, ...]
    origin: str


NAMED = 5  # paths listed in a message


class Skipped(NamedTuple):
    """Paths that a source leaves out.

    Attributes:
        others: files without an image suffix (only the first few).
        links: symbolic links to folders.
        unreadable: images that cannot be read.
        more_others: number of further files without an image suffix.
        beside: images and folders next to the folders of classes or splits (only the first few).
        more_beside: number of further images and folders of that kind.
    """

    others: tuple[str, ...] = ()
    links: tuple[str, ...] = ()
    unreadable: frozenset[str] = frozenset()
    more_others: int = 0
    beside: tuple[str, ...] = ()
    more_beside: int = 0


class Fingerprint(NamedTuple):
    """Hashes that tell whether a data set is the same as in an earlier run; cheap to compute.

    Attributes:
        data: hash of the class names, the labels, and the names and sizes of files or the shape of
            arrays.
        times: hash of the times when files were changed; empty if there are no files.
        content: hash of the content of at most FINGERPRINT_IMAGES images, evenly spaced.
    """

    data: str
    times: str
    content: str


FINGERPRINT_IMAGES = 64  # number of images whose content is part of a fingerprint


@runtime_checkable
class Source(Protocol):
    """One split of a data set.

    A source can be pickled, and its pickle holds no pixels: worker processes open the data
    themselves.

    If images are not independent, such as two drawings of an emoji, a source also has ``groups``,
    an integer (b,) for each image: images of the same group count as one observation in standard
    errors.
    """

    @property
    def name(self) -> str:
        """The data set and the split, such as "digits:train"."""

    @property
    def class_names(self) -> tuple[str, ...]:
        """The names of the classes, in the order of the labels."""

    @property
    def skipped(self) -> Skipped:
        """The paths that are left out."""

    @property
    def max_labels(self) -> int:
        """The largest number of labels of an example; at least 1."""

    def __len__(self) -> int:
        """The number of examples."""

    def __getitem__(self, index: int) -> Example:
        """The example at an index in [0, len).

        Raises:
            UsageError: its file cannot be read.
            Failure: its file cannot be read for a temporary reason; it is not replaced.
        """

    def labels_of(self, index: int) -> tuple[int, ...]:
        """The labels of the example at an index, without reading its image."""

    def fingerprint(self) -> Fingerprint:
        """Hashes of the data; a change of an image that is not in the sample may go unnoticed."""


def sampled(count: int) -> list[int]:
    """Evenly spaced indices of the images whose content is part of a fingerprint.

    >>> sampled(2), len(sampled(1000))
    ([0, 1], 64)
    """
    few = min(count, FINGERPRINT_IMAGES)
    return [i * count // few for i in range(few)]


class BaseSource:
    """The code that the sources of all formats share.

    A pickle holds the arguments that the source was made with. A format that skips no files need
    not set ``skipped``.
    """

    skipped = Skipped()

    def __new__(cls, *args: Any, **kwargs: Any) -> Any:
        source = super().__new__(cls)
        source.__dict__["_made"] = functools.partial(cls, *args, **kwargs)
        return source

    def __reduce__(self) -> tuple[Callable[[], "BaseSource"], tuple[()]]:
        return self.__dict__["_made"], ()

    def __len__(self) -> int:
        raise NotImplementedError

    def __getitem__(self, index: int) -> Example:
        raise NotImplementedError

    def fingerprint(self) -> Fingerprint:
        """Hashes of the data; a change of an image that is not in the sample may go unnoticed."""
        data, times = self._description()
        content = hashlib.sha256()
        for i in sampled(len(self)):
            content.update(self._content(i))
        return Fingerprint(data, times, content.hexdigest())

    def _description(self) -> tuple[str, str]:
        """The hashes ``Fingerprint.data`` and ``Fingerprint.times``."""
        raise NotImplementedError

    def _content(self, index: int) -> bytes:
        """The bytes of an example that are hashed."""
        image = self[index].image
        return image if isinstance(image, bytes) else image.tobytes()


def digest(value: object) -> str:
    """A hash of the ``repr`` of a value."""
    return hashlib.sha256(repr(value).encode()).hexdigest()
