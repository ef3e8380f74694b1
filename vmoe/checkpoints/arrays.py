"""Named arrays in files, whatever the format of the files."""

import dataclasses
import math
from collections.abc import Callable, Collection, Iterator
from pathlib import Path
from typing import NamedTuple

import ml_dtypes as ml_dtypes  # NumPy then knows bfloat16
import numpy as np

from vmoe.errors import Failure

DTYPES = frozenset(
    ("bool", "bfloat16", "float16", "float32", "float64", "complex64", "complex128")
) | {f"{kind}{bits}" for kind in ("int", "uint") for bits in (8, 16, 32, 64)}
FLOATS = frozenset(("bfloat16", "float16", "float32", "float64"))  # dtypes of parameters
MAX_AXES = 8


class ArrayInfo(NamedTuple):
    """The shape and the dtype of an array."""

    shape: tuple[int, ...]
    dtype: np.dtype

    @property
    def size(self) -> int:
        """Number of elements."""
        return math.prod(self.shape)

    @property
    def nbytes(self) -> int:
        """Number of bytes."""
        return self.size * self.dtype.itemsize


@dataclasses.dataclass(frozen=True)
class ArrayFile:
    """The arrays of a file, or of several files that belong together.

    Attributes:
        path: path of the file, for messages.
        infos: shape and dtype of each array by name, as the file declares them.
        read: returns the arrays of some names, each once, in the order that suits the file. Raises
            a Failure if the file is corrupt.
    """

    path: Path
    infos: dict[str, ArrayInfo]
    read: Callable[[Collection[str]], Iterator[tuple[str, np.ndarray]]]


def array_info(shape: object, dtype: object) -> ArrayInfo:
    """Makes an ArrayInfo of values that a file declares.

    Raises:
        ValueError: they are not the shape and dtype of an array that can be read.
    """
    if (
        not isinstance(shape, list | tuple)
        or len(shape) > MAX_AXES
        or not all(type(n) is int and 0 <= n < 1 << 40 for n in shape)
        or math.prod(n or 1 for n in shape) >= 1 << 48  # NumPy makes no such array, even if empty
    ):
        raise ValueError(f"shape {shape!r:.80}")
    name = dtype.decode() if isinstance(dtype, bytes) else dtype
    if name not in DTYPES:
        raise ValueError(f"dtype {dtype!r:.80}")
    return ArrayInfo(tuple(shape), np.dtype(str(name)))


def corrupt(path: str | Path, reason: object) -> Failure:
    """The error about a file whose content is wrong."""
    return Failure(f"{path}: corrupt ({reason})")
