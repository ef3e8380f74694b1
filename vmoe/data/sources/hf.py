"""Data sets of Hugging Face ``datasets``, as ``save_to_disk`` writes them (Arrow files).

    hf:FOLDER      a data set, or a dictionary of splits: train, validation, test

The images are in the column ``image``, or else in the only column of images. The labels are in the
column ``label`` or ``labels``: a ClassLabel, an integer, or a list of these; -1 and null mean no
label. The classes have the names of the ClassLabel, or else their numbers.

If there are no splits, one of every ten rows is validation, one is test and eight are train. If
only validation is missing, it is one of every ten rows of train. A hash of the number of each
block of ten decides which rows these are, so cyclic labels do not produce single-class splits.
Nothing is stored, and every process finds the same rows.

The files are mapped into memory. Images are not decoded by ``datasets``. Parquet files are not
read: ``load_dataset("parquet", data_files=...).save_to_disk(FOLDER)`` converts them.
"""

import functools
import hashlib
import os
from pathlib import Path
from typing import Any

from vmoe.data.sources.index import state_of
from vmoe.data.sources.source import BaseSource, Example, digest, sampled
from vmoe.data.sources.splits import resolve_split
from vmoe.data.sources.vocabulary import names_of
from vmoe.errors import UsageError, one_line, reading
from vmoe.host.retry import retried

LABELS = ("label", "labels")
# By split: where its rows start among every ten, in the order of ``_block``, and their number.
PARTS = {"validation": (0, 1), "test": (1, 1), "train": (2, 8)}
WITHOUT_TEST = {"validation": (0, 1), "train": (1, 9)}
WHOLE = (0, 10)


def open_hf(folder: str, split: str) -> "HfSource":
    """Opens a split of a folder of ``save_to_disk``, after checking the labels of all examples."""
    source = HfSource(folder, split)
    source.check()
    return source


class HfSource(BaseSource):
    """A split of a data set of Hugging Face."""

    def __init__(self, folder: str, split: str):
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
        return names_of(self._statistics[1], names or None, "its ClassLabel", self._place)

    @property
    def max_labels(self) -> int:
        return max(1, self._statistics[2])

    def __len__(self) -> int:
        blocks, rest = divmod(len(self._data), 10)
        return blocks * self._width + sum(place < rest for place in self._places(blocks))

    def _row(self, index: int) -> int:
        block, i = divmod(range(len(self))[index], self._width)
        return 10 * block + self._places(block)[i]

    def _places(self, block: int) -> list[int]:
        """The positions of the split's rows among the ten of a block, in ascending order."""
        return sorted(_block(block)[self._start : self._start + self._width])

    def __getitem__(self, index: int) -> Example:
        origin = f"{self.name}[{index}]"
        row = self._row(index)
        with reading(origin):  # an error that can pass is a Failure
            fields = retried(origin, lambda: self._data[row])
        image = fields[self._image] or {}
        content = image.get("bytes")
        if content is None:
            path = image.get("path")
            raise UsageError(
                f"{origin}: the path {path!r}, not an image; save the data set with its images"
            )
        return Example(content, _labels(fields[self._label]), origin)

    def labels_of(self, index: int) -> tuple[int, ...]:
        row, origin = self._row(index), f"{self.name}[{index}]"
        with reading(origin):
            return _labels(retried(origin, lambda: self._labels[row])[self._label])

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
        """Checks all labels, and that some images are stored in the files."""
        smallest, _, _ = self._statistics
        if smallest < -1:
            raise UsageError(f"{self._place}: label {smallest}; number the classes from 0")
        _ = self.class_names  # this checks the largest label
        for i in sampled(len(self)):
            self[i]

    def _description(self) -> tuple[str, str]:
        """Hashes of the class names, and of the names, sizes and times of the files."""
        files = [each["filename"] for each in self._data.cache_files]
        states = [state_of(file) for file in files]
        sizes = [(os.path.basename(f), size) for f, (size, _) in zip(files, states, strict=True)]
        data = (self.class_names, self._start, self._width, sizes)
        return digest(data), digest([time for _, time in states])

    def _content(self, index: int) -> bytes:
        example = self[index]
        assert isinstance(example.image, bytes)
        return repr(example.labels).encode() + example.image


def _open(folder: str, split: str, place: str) -> tuple[Any, tuple[int, int]]:
    """A stored split, whose images are not decoded, and the part of it to use."""
    try:
        import datasets
    except ImportError:
        raise UsageError(f"{place}: needs the package datasets: pip install 'vmoe[hf]'") from None
    if not Path(folder).is_dir():
        raise UsageError(f"{place}: no such folder; give one that save_to_disk has written")
    with reading(place, "truncated or corrupt"):
        try:
            loaded = retried(place, lambda: datasets.load_from_disk(folder, keep_in_memory=False))
        except FileNotFoundError as error:
            reason = one_line(str(error))
            raise UsageError(
                f"{place}: not written by save_to_disk, or incomplete ({reason})"
            ) from None
    if isinstance(loaded, datasets.DatasetDict):
        stored_split, fractions = resolve_split(split, list(loaded), place)
        loaded = loaded[stored_split]
        part = WITHOUT_TEST[split] if fractions else WHOLE
    else:
        part = PARTS[split]
    for name, feature in loaded.features.items():
        if isinstance(feature, datasets.Image):
            loaded = loaded.cast_column(name, datasets.Image(decode=False))
    return loaded, part


def _block(number: int) -> list[int]:
    """The ten rows of a block: first of validation, then of test, then the others.

    >>> _block(1), _block(5)
    ([3, 8, 0, 1, 2, 4, 5, 6, 7, 9], [3, 2, 0, 1, 4, 5, 6, 7, 8, 9])
    """
    chosen = int.from_bytes(hashlib.sha256(b"%d" % number).digest()[:8], "big")
    validation = chosen % 10
    test = (validation + 1 + chosen // 10 % 9) % 10
    return [validation, test, *(i for i in range(10) if i not in (validation, test))]


def _columns(data: Any, place: str) -> tuple[str, str]:
    """The names of the columns of images and of labels."""
    import datasets

    columns = ", ".join(data.features)
    images = [name for name, each in data.features.items() if isinstance(each, datasets.Image)]
    if len(images) != 1 and "image" not in images:
        remedy = "rename the one to use to image" if images else "cast_column one to Image"
        raise UsageError(f"{place}: {len(images)} of the columns {columns} are images; {remedy}")
    labels = [name for name in LABELS if name in data.features]
    if not labels:
        raise UsageError(
            f"{place}: the columns are {columns}; none is {' or '.join(LABELS)}; rename the column "
            "of the classes to label"
        )
    inner = _inner(data.features[labels[0]])
    if not str(getattr(inner, "dtype", "")).startswith(("int", "uint")):
        raise UsageError(
            f"{place}: the column {labels[0]} is {inner}; it has to be a ClassLabel or integers"
        )
    return "image" if "image" in images else images[0], labels[0]


def _inner(feature: Any) -> Any:
    """The feature of a single label, in a column of labels or of lists of labels."""
    return getattr(feature, "feature", feature)


def _labels(value: Any) -> tuple[int, ...]:
    values = value if isinstance(value, list) else [value]
    return tuple(label for label in values if label is not None and label != -1)
