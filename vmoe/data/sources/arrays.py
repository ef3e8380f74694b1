"""Sources whose pixels are one array, and the format of NumPy files.

The images are in one NumPy file, or in a folder of NumPy files.

    images, labels               not split: 80% of each class is train, 10% validation, 10% test
    train_images, train_labels,  split as named: train, validation, test, or as ``splits.py`` lists
    test_images, ...             them; without arrays for validation, 10% of train
    class_names                  optional

Images are uint8 (b, h, w, 3), (b, h, w, 1) or (b, h, w); labels are integers from 0: (b), or (b, l)
for up to l labels an image, padded with -1. Other arrays are not read. The classes have the names
in class_names, or else their numbers.

Arrays of an uncompressed file (``numpy.savez``), or of a folder (``images.npy``, ``labels.npy`` and
so on), are mapped into memory: processes share them, and read only what they use. Each process
reads the arrays of a compressed file into its own memory. If a split is split off here, each
process holds the indices of its images, 8 bytes each.
"""

import functools
import hashlib
import math
import os
import re
import struct
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Int, Integer, UInt8

from vmoe.data.sources.index import CHUNK, state_of
from vmoe.data.sources.source import BaseSource, Example
from vmoe.data.sources.splits import named_splits, resolve_split, stratified_split
from vmoe.data.sources.vocabulary import check_distinct, names_of
from vmoe.errors import UsageError, reading, repeated
from vmoe.host.retry import open_regular, retried

IMAGES = "_images"  # suffix of the names of image arrays
LOCAL_HEADER = 30  # bytes before the name of a file in a .zip
PIECE = 1 << 20  # bytes read at once
USED = re.compile(r"(.*_)?(images|labels)|class_names", re.DOTALL)  # names of arrays


Arrays = tuple[
    str,
    UInt8[np.ndarray, "_ h w 3"],
    Integer[np.ndarray, "_"] | Integer[np.ndarray, "_ l"],
    tuple[str, ...],
    Int[np.ndarray, "_"] | None,
]
"""Name of a source, images, their labels, class names, rows; see ``ArraySource``."""


class ArraySource(BaseSource):
    """A split of a data set that is one array, in memory or memory-mapped.

    Attributes:
        labels: one label for each image, or several padded with -1; of any integer type.
        rows: indices of the examples in ``images`` and ``labels``; None if these are all.
    """

    def __init__(self, read: Callable[..., Arrays], *args: Any):
        """A pickle has the name of ``read``, a function of a module, and its ``args``."""
        self.name, self.images, self.labels, self.class_names, self.rows = read(*args)

    @functools.cached_property
    def max_labels(self) -> int:
        if self.labels.ndim == 1:
            return 1
        return max([1, *(int((labels >= 0).sum(1).max()) for labels in self._label_chunks())])

    def __len__(self) -> int:
        return len(self.labels if self.rows is None else self.rows)

    def __getitem__(self, index: int) -> Example:
        pixels = np.asarray(self.images[self._row(index)])
        return Example(pixels, self.labels_of(index), f"{self.name}[{index}]")

    def _row(self, index: int) -> int:
        return index if self.rows is None else int(self.rows[index])

    def labels_of(self, index: int) -> tuple[int, ...]:
        labels = np.atleast_1d(self.labels[self._row(index)])
        return tuple(label for label in labels.tolist() if label >= 0)

    def _label_chunks(self) -> Iterator[np.ndarray]:
        """The labels of all examples in parts, so that mapped labels are not copied as a whole."""
        for start in range(0, len(self), CHUNK):
            rows = slice(start, start + CHUNK)
            yield self.labels[rows if self.rows is None else self.rows[rows]]

    def _description(self) -> tuple[str, str]:
        """A hash of the class names, the labels and the shape."""
        shape = (len(self), *self.images.shape[1:])
        data = hashlib.sha256(repr((self.class_names, shape)).encode())
        for labels in self._label_chunks():
            data.update(labels.astype(np.int64).tobytes())
        return data.hexdigest(), ""


def rgb(gray: UInt8[np.ndarray, "b h w"]) -> UInt8[np.ndarray, "b h w 3"]:
    """Gray images with three equal channels, as a read-only view: the pixels are not copied."""
    return np.broadcast_to(gray[..., None], (*gray.shape, 3))


def open_arrays(path: str, split: str) -> ArraySource:
    """Opens a split of a .npz file, or of a folder of .npy files."""
    return ArraySource(_load, path, split)


def _load(path: str, split: str) -> Arrays:
    place = f"arrays:{path}"
    with reading(place, "not a complete .npz of plain arrays"):
        try:
            arrays, names = retried(place, lambda: _read(path, place))
        except FileNotFoundError:
            raise UsageError(f"{place}: no such file or folder") from None
    prefixes = [name.removesuffix(IMAGES) for name in arrays if name.endswith(IMAGES)]
    available = [*named_splits(prefixes, place).values()]
    pairs = {
        name: _pair(arrays, names, f"{name}_" if name else "", place) for name in available or [""]
    }
    given = None
    if "class_names" in arrays:
        given = _texts(arrays["class_names"], f"{place}: class_names")
        check_distinct(given, f"{place}: class_names")
    largest = max(int(labels.max()) for _, labels in pairs.values())
    class_names = names_of(largest, given, "class_names", place)
    stored_split, fractions = resolve_split(split, available, place)
    images, labels = pairs[stored_split]
    rows = None
    if fractions:
        several = labels.ndim > 1  # an image can have several classes
        rows = stratified_split(
            np.zeros(len(labels), np.int64) if several else labels,
            fractions,
            class_names=["all"] if several else class_names,
            place=place,
        )[split]
    return f"{place}:{split}", images, labels, class_names, rows


def _texts(array: np.ndarray, where: str) -> tuple[str, ...]:
    """The texts in an array; h5py and older programs store them as bytes."""
    texts = array.tolist() if array.ndim == 1 else []
    with reading(where, "is not text in UTF-8"):
        return tuple(x.decode() if isinstance(x, bytes) else str(x) for x in texts)


def _read(path: str, place: str) -> tuple[dict[str, np.ndarray], list[str]]:
    """The arrays that are not ignored, and the names of all."""
    if Path(path).is_dir():
        files = {each.stem: each for each in sorted(Path(path).glob("*.npy"))}
        used = {name: file for name, file in files.items() if USED.fullmatch(name)}
        for file in used.values():
            state_of(file)  # it may be a pipe, which would never end
        arrays = {name: np.load(file, "r", allow_pickle=False) for name, file in used.items()}
        return arrays, list(files)
    with open_regular(path) as file:
        loaded = np.load(file, allow_pickle=False)
        if isinstance(loaded, np.ndarray):
            raise UsageError(f"{place}: holds one array; save several with np.savez")
        if name := repeated(loaded.files):
            raise UsageError(f"{place}: two arrays are called {name!r}; save it again")
        if len({each.header_offset for each in loaded.zip.infolist()}) < len(loaded.files):
            raise UsageError(f"{place}: two arrays start at the same byte; save it again")
        names = [name for name in loaded.files if USED.fullmatch(name)]
        return {name: _mapped(path, loaded, name) for name in names}, loaded.files


def _mapped(path: str, loaded: np.lib.npyio.NpzFile, name: str) -> np.ndarray:
    """An array of a .npz file; uncompressed images and labels are mapped.

    Mapped labels are compared with their checksum; mapped images are not, to avoid reading them.
    """
    with zipfile.ZipFile(path) as archive:
        member = archive.getinfo(f"{name}.npy")
        if not name.endswith(("images", "labels")) or member.compress_type != zipfile.ZIP_STORED:
            return loaded[name]
        if name.endswith("labels"):
            with archive.open(member) as opened:
                while opened.read(PIECE):
                    pass
    with open(path, "rb") as file:
        file.seek(member.header_offset)
        header = file.read(LOCAL_HEADER)
        file.seek(sum(struct.unpack("<HH", header[26:])), os.SEEK_CUR)  # its name and extra
        start = file.tell()
        version = np.lib.format.read_magic(file)
        read = {
            (1, 0): np.lib.format.read_array_header_1_0,
            (2, 0): np.lib.format.read_array_header_2_0,
        }.get(version)
        if read is None:
            return loaded[name]
        shape, fortran, dtype = read(file)
        if dtype.hasobject or not math.prod(shape):  # an error, or nothing to map
            return loaded[name]
        if file.tell() - start + math.prod(shape) * dtype.itemsize != member.file_size:
            raise ValueError(f"{name} does not have the length of its shape {shape}")
        return np.memmap(path, dtype, "r", file.tell(), shape, "F" if fortran else "C")


def _pair(
    arrays: dict[str, np.ndarray], names: list[str], prefix: str, place: str
) -> tuple[np.ndarray, np.ndarray]:
    for name in (f"{prefix}images", f"{prefix}labels"):
        if name not in arrays:
            known = ", ".join(names) or "nothing"
            raise UsageError(f"{place}: no array {name!r}; the file holds {known}")
    images, labels = arrays[f"{prefix}images"], arrays[f"{prefix}labels"]
    if images.ndim == 4 and images.shape[-1] == 1:
        images = images[..., 0]
    fits = images.ndim == 3 or images.shape[3:] == (3,)
    if images.dtype != np.uint8 or not fits or not all(images.shape[1:]):
        raise UsageError(
            f"{place}: {prefix}images is {images.dtype} {images.shape}; give uint8 (b, h, w, 3) "
            "or (b, h, w)"
        )
    several = labels.ndim == 2 and labels.shape[1] > 0
    fits = labels.ndim == 1 + several and len(labels) == len(images)
    if not np.issubdtype(labels.dtype, np.integer) or not fits:
        raise UsageError(
            f"{place}: {prefix}labels is {labels.dtype} {labels.shape}; give an integer for each "
            f"of the {len(images)} images, or several padded with -1"
        )
    if not len(labels) or int(labels.min()) < -several:
        padding = "-1" if several else "0"
        raise UsageError(f"{place}: {prefix}labels: give at least one, none below {padding}")
    return (rgb(images) if images.ndim == 3 else images), labels
