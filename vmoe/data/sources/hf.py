"""Data sets of Hugging Face ``datasets``, as ``save_to_disk`` writes them (Arrow files).

    hf:FOLDER      a data set, or a dictionary of splits: train, validation, test

An example needs one column of images, and a column ``label`` or ``labels`` that is a ClassLabel, an
integer, or a list of these; -1 and null are no label. The classes have the names of that column,
or else their numbers. Without splits, of every ten images in a row eight are train, one is
validation and one test; without one for validation, every tenth image of train is.

The files are mapped into memory. Images are not decoded by ``datasets``. Parquet files are not
read: ``load_dataset("parquet", data_files=...).save_to_disk(FOLDER)`` converts them.
"""

import functools
import hashlib
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

from vmoe.data.sources.source import Example, Fingerprint, Skipped, sampled
from vmoe.data.sources.splits import SPLITS, resolve_split
from vmoe.data.sources.vocabulary import MOST_CLASSES
from vmoe.errors import UsageError, one_line

LABELS = ("label", "labels")
# Of every ten images in a row, where those of a split start, and how many they are.
PARTS = {"train": (0, 8), "validation": (8, 1), "test": (9, 1)}
WITHOUT_TEST = {"train": (0, 9), "validation": (9, 1)}
WHOLE = (0, 10)


def open_hf(folder: str, split: str) -> "HfSource":
    """Opens a split, after checking the labels of all its examples.

    Args:
        folder: that ``save_to_disk`` has written.
        split: "train", "validation" or "test".

    Raises:
        UsageError: ``datasets`` is not installed; there is no such data set or split, a file is
            truncated, or a column is missing or of a wrong type.
    """
    source = HfSource(folder, split)
    source.check()
    return source


class HfSource:
    """A split of a data set of Hugging Face; see ``Source``."""

    def __init__(self, folder: str, split: str):
        """
        Args:
            folder: that ``save_to_disk`` has written.
            split: "train", "validation" or "test".
        """
        self._arguments = (folder, split)
        self._place = f"hf:{folder}"
        self.name = f"{self._place}:{split}"
        data, (self._start, self._width) = _open(folder, split, self._place)
        self._image, self._label = _columns(data, self._place)
        self._data = data.select_columns([self._image, self._label])  # others are not read
        self._labels = data.select_columns([self._label])
        if not len(self):
            raise UsageError(f"{self.name}: no images in it")

    @functools.cached_property
    def class_names(self) -> tuple[str, ...]:
        names = getattr(_inner(self._data.features[self._label]), "names", None)
        return tuple(names or map(str, range(self._statistics[1] + 1)))

    @property
    def skipped(self) -> Skipped:
        """Nothing is skipped."""
        return Skipped()

    @property
    def max_labels(self) -> int:
        return max(1, self._statistics[2])

    def __len__(self) -> int:
        tens, rest = divmod(len(self._data), 10)
        return tens * self._width + min(max(rest - self._start, 0), self._width)

    def _row(self, index: int) -> int:
        tens, rest = divmod(range(len(self))[index], self._width)
        return 10 * tens + self._start + rest

    def __getitem__(self, index: int) -> Example:
        origin = f"{self.name}[{index}]"
        row = self._row(index)
        try:
            fields = self._data[row]
        except Exception as error:  # of many types
            raise UsageError(f"{origin}: cannot be read ({one_line(str(error))})") from None
        image = fields[self._image] or {}
        content = image.get("bytes")
        if content is None:
            path = image.get("path")
            raise UsageError(
                f"{origin}: no image in the file, but {path!r}; save the data set with its images"
            )
        return Example(content, _labels(fields[self._label]), origin)

    def labels_of(self, index: int) -> tuple[int, ...]:
        return _labels(self._labels[self._row(index)][self._label])

    @functools.cached_property
    def _statistics(self) -> tuple[int, int, int]:
        """The smallest and the largest label, and the largest number of labels of an example."""
        import pyarrow
        import pyarrow.compute

        column, most = self._data.data.column(self._label), 1
        if pyarrow.types.is_nested(column.type):
            most = pyarrow.compute.max(pyarrow.compute.list_value_length(column)).as_py() or 0
            column = pyarrow.compute.list_flatten(column)
        range_ = pyarrow.compute.min_max(column).as_py()
        smallest, largest = (-1 if each is None else each for each in range_.values())
        return smallest, largest, most

    def check(self) -> None:
        """Checks all labels, and that some images are in the files.

        Raises:
            UsageError: a label is out of range, or an image is missing.
        """
        smallest, largest, _ = self._statistics
        if smallest < -1 or largest >= MOST_CLASSES:
            wrong = smallest if smallest < -1 else largest
            raise UsageError(f"{self._place}: label {wrong}; number the classes from 0")
        if largest >= len(self.class_names):
            raise UsageError(
                f"{self._place}: label {largest} has no name; {self._label} has "
                f"{len(self.class_names)} names, for labels from 0"
            )
        for i in sampled(len(self)):
            self[i]

    def fingerprint(self) -> Fingerprint:
        """Hashes of the class names, of the names, sizes and times of the files, and of the labels
        and images of some examples.
        """
        files = [each["filename"] for each in self._data.cache_files]
        states = [os.stat(file) for file in files]
        sizes = [(os.path.basename(f), s.st_size) for f, s in zip(files, states, strict=True)]
        data = hashlib.sha256(repr((self.class_names, self._start, self._width, sizes)).encode())
        times = hashlib.sha256(repr([state.st_mtime_ns for state in states]).encode())
        content = hashlib.sha256()
        for i in sampled(len(self)):
            example = self[i]
            assert isinstance(example.image, bytes)
            content.update(repr(example.labels).encode() + example.image)
        return Fingerprint(data.hexdigest(), times.hexdigest(), content.hexdigest())

    def __reduce__(self) -> tuple[Callable[..., "HfSource"], tuple[str, str]]:
        return HfSource, self._arguments


def _open(folder: str, split: str, place: str) -> tuple[Any, tuple[int, int]]:
    """A stored split, whose images are not decoded, and the part of it that is asked for."""
    try:
        import datasets
    except ImportError:
        raise UsageError(f"{place}: needs the package datasets: pip install 'vmoe[hf]'") from None
    if not Path(folder).is_dir():
        raise UsageError(f"{place}: no such folder; give one that save_to_disk has written")
    try:
        loaded = datasets.load_from_disk(folder, keep_in_memory=False)
    except FileNotFoundError as error:
        raise UsageError(
            f"{place}: not written by save_to_disk, or incomplete ({one_line(str(error))})"
        ) from None
    except Exception as error:  # of many types
        raise UsageError(f"{place}: truncated or corrupt ({one_line(str(error))})") from None
    if isinstance(loaded, datasets.DatasetDict):
        stored_split, fractions = resolve_split(split, [s for s in SPLITS if s in loaded], place)
        loaded = loaded[stored_split]
        part = WITHOUT_TEST[split] if fractions else WHOLE
    else:
        part = PARTS[split]
    for name, feature in loaded.features.items():
        if isinstance(feature, datasets.Image):
            loaded = loaded.cast_column(name, datasets.Image(decode=False))
    return loaded, part


def _columns(data: Any, place: str) -> tuple[str, str]:
    """The names of the columns of images and of labels."""
    import datasets

    columns = ", ".join(data.features)
    images = [name for name, each in data.features.items() if isinstance(each, datasets.Image)]
    if len(images) != 1:
        raise UsageError(f"{place}: {len(images)} of the columns {columns} are images; give one")
    labels = [name for name in LABELS if name in data.features]
    if not labels:
        raise UsageError(f"{place}: the columns are {columns}; none is {' or '.join(LABELS)}")
    inner = _inner(data.features[labels[0]])
    if not str(getattr(inner, "dtype", "")).startswith(("int", "uint")):
        raise UsageError(
            f"{place}: the column {labels[0]} is {inner}; it has to be a ClassLabel or integers"
        )
    return images[0], labels[0]


def _inner(feature: Any) -> Any:
    """The feature of one label in a column that may have lists of them."""
    return getattr(feature, "feature", feature)


def _labels(value: Any) -> tuple[int, ...]:
    values = value if isinstance(value, list) else [value]
    return tuple(label for label in values if label is not None and label != -1)
