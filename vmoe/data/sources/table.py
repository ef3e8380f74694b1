"""Tables of labelled images on the disk, and the sources that read them.

A folder, a manifest and tar shards give the rows of a table; its splits, labels, class names and
fingerprint are the same for all of them. Its columns are those of an index (``index.py``):

    paths    names of the images; a hash of the name decides the split where the data has none
    labels   classes of each image
    sizes    in bytes
    and what else reading needs, such as times or offsets
    rows_SPLIT   the rows of a split, where not all rows are in one

To build a table takes at most 41 bytes of memory for each image of one label, 49 where images are
compared (measured at a million images); the walk through a folder takes 52 beside that, of which 36
are the path (at 100,000). So the 14 million images of ImageNet-21k take 1.3 GB while their folder
is indexed, and 300 million of a manifest 15 GB. A table that is open takes none (``index.py``).
"""

import itertools
import os
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Int, Int8, Integer, Num

from vmoe.config.data import Check, OnError
from vmoe.data.check import unreadable
from vmoe.data.decode import ImageFile, read_bytes
from vmoe.data.sources.index import Columns, Index, IndexWriter
from vmoe.data.sources.source import BaseSource, Example, Skipped, digest
from vmoe.data.sources.splits import give_every_split_one, hashed_split, name_hashes
from vmoe.errors import UsageError, listed, unknown

LISTED = 20  # unreadable images that an error names


class TableWriter:
    """Writes a table, piece by piece; a context that closes its files.

    Names, sizes and the like go to the disk at once. Labels, and the hashes that decide the splits,
    are in memory until the last row is there.
    """

    def __init__(self, folder: Path, identity: Callable[[str], str] | None = None):
        """
        Args:
            folder: an empty one.
            identity: gives the same text for all names of one image. If it is given, an image that
                is there twice is an error.
        """
        self._index, self._identity = IndexWriter(folder), identity
        self._hashes: list[np.ndarray] = []
        self._identities: list[np.ndarray] = []
        self._labels: list[np.ndarray] = []
        self._counts: list[np.ndarray] = []
        self._splits: list[np.ndarray] = []

    def __enter__(self) -> "TableWriter":
        return self

    def __exit__(self, *exception: object) -> None:
        self._index.__exit__(*exception)

    def append(
        self,
        paths: Sequence[str],
        labels: Sequence[Sequence[int]],
        split: Int8[np.ndarray, "b"] | None = None,
        **columns: Num[np.ndarray, "b"],
    ) -> None:
        """Appends rows.

        Args:
            labels: the classes of each image, or numbers for ``finish`` to replace.
            split: of each image, as an index into the ``splits`` of ``finish``.
            columns: further columns.
        """
        self._hashes.append(name_hashes(paths))
        if self._identity:
            self._identities.append(name_hashes(list(map(self._identity, paths))))
        self._labels.append(np.fromiter(itertools.chain.from_iterable(labels), np.int32))
        self._counts.append(np.array([len(each) for each in labels], np.int32))
        if split is not None:
            self._splits.append(split)
        self._index.append_texts("paths", paths)
        for name, column in columns.items():
            self._index.append(name, column)

    def finish(
        self,
        class_names: tuple[str, ...],
        *,
        place: str,
        splits: Sequence[str] = (),
        fractions: Mapping[str, float] | None = None,
        classes: Int[np.ndarray, "x"] | None = None,
        **info: Any,
    ) -> None:
        """Writes the labels, the splits, and what opening needs.

        Args:
            place: the data set, for error messages.
            splits: names of splits, which the ``split`` of the rows indexes; without them all rows
                are in one split.
            fractions: by split, the fraction of the images to split off: of those of the split
                "train", or of all if there are no splits.
            classes: by which to replace the labels.
            info: JSON values for ``Index.info``.

        Raises:
            UsageError: there are no images, or too few of a class, or one twice.
        """
        if not any(map(len, self._counts)):
            raise UsageError(f"{place}: no images in it")
        if self._identities:
            self._check_unique(place)
        counts, labels = np.concatenate(self._counts), np.concatenate(self._labels)
        if classes is not None:
            labels = classes.astype(np.int32)[labels]
        self._index.append_ragged("labels", labels, counts)
        single = class_names if counts.min() == counts.max() == 1 else ()
        names, chosen = self._assign(splits, fractions or {}, labels, single, place)
        for i, name in enumerate(names):
            self._index.append(f"rows_{name}", np.flatnonzero(chosen == i).astype(np.uint32))
        columns = self._index.columns()
        rows = {name: _rows(columns, name) for name in names or [""]}
        info["splits"] = {
            name: {
                "count": len(each),
                "data": columns.digest(("paths", "labels", "sizes"), each),
                "times": columns.digest(["times"], each) if "times" in columns else "",
            }
            for name, each in rows.items()
            if len(each)
        }
        most = max(1, int(counts.max()))
        self._index.finish(class_names=class_names, max_labels=most, place=place, **info)

    def _assign(
        self,
        splits: Sequence[str],
        fractions: Mapping[str, float],
        labels: Int[np.ndarray, "_"],
        class_names: Sequence[str],
        place: str,
    ) -> tuple[list[str], Int8[np.ndarray, "b"]]:
        """The names of the splits, and that of each row, as an index into them.

        Args:
            splits, fractions: as for ``finish``; without either there are no names.
            class_names: if given, every class is in every split.
        """
        given = np.concatenate(self._splits or [np.empty(0, np.int8)])
        if not fractions:
            return list(splits), given
        names = [*fractions, "train", *(name for name in splits if name != "train")]
        chosen = np.concatenate([hashed_split(each, fractions) for each in self._hashes])
        if splits:
            given = np.array([names.index(name) for name in splits], np.int8)[given]
            chosen = np.where(given == names.index("train"), chosen, given)
        if class_names:
            give_every_split_one(
                chosen,
                np.concatenate(self._hashes),
                labels,
                fractions,
                class_names=class_names,
                place=place,
            )
        return names, chosen

    def _check_unique(self, place: str) -> None:
        """Checks that no image is there twice."""
        assert self._identity is not None
        identities, columns = np.concatenate(self._identities), self._index.columns()
        in_order = np.sort(identities)
        for repeated in in_order[1:][in_order[1:] == in_order[:-1]]:
            paths = [path_of(columns, int(row)) for row in np.flatnonzero(identities == repeated)]
            if len(set(map(self._identity, paths))) < len(paths):
                also = next((f", also as {path}" for path in paths if path != paths[0]), "")
                raise UsageError(
                    f"{place}: {paths[0]} is there twice{also}; list each image once, with all its "
                    "labels"
                )


def _rows(columns: Columns, split: str) -> Integer[np.ndarray, "x"] | range:
    return columns[f"rows_{split}"] if f"rows_{split}" in columns else range(len(columns["sizes"]))


def path_of(columns: Columns, row: int) -> str:
    """The name of the image in a row."""
    return os.fsdecode(columns.values("paths", row).tobytes())


class TableSource(BaseSource):
    """One split of a table; a format adds how to read the image in a row.

    Its pickle holds the path of the table, not the names of the images.

    Attributes:
        index: the columns.
    """

    def __init__(
        self, name: str, folder: str | Path, split: str, left_out: Sequence[int] = ()
    ) -> None:
        """Opens a table.

        Args:
            folder: of the table.
            split: of the table; any, where all rows are in one split.
            left_out: rows that are no part of the split, in ascending order.

        Raises:
            UsageError: the table is gone or incomplete, or has no such split.
        """
        self.name, self.index = name, Index(folder)
        info = self.index.info
        self.class_names, self.max_labels = tuple(info["class_names"]), info["max_labels"]
        splits = info["splits"]
        if "" not in splits and split not in splits:
            raise UsageError(unknown(f"{info['place']} has no split", split, [*splits]))
        self._split = splits["" if "" in splits else split]
        self._rows = _rows(self.index, split)
        self._left_out = _positions(self._rows, left_out)
        # The n-th image left out moves those behind it n places forward.
        self._shifts = self._left_out - np.arange(len(self._left_out))

    def __len__(self) -> int:
        return self._split["count"] - len(self._left_out)

    def row(self, index: int) -> int:
        """The row of the image at an index in [0, len)."""
        return int(self._rows[index + int(np.searchsorted(self._shifts, index, "right"))])

    def path(self, index: int) -> str:
        """The name of the image at an index."""
        return path_of(self.index, self.row(index))

    def labels_of(self, index: int) -> tuple[int, ...]:
        return tuple(self.index.values("labels", self.row(index)).tolist())

    def _description(self) -> tuple[str, str]:
        data = (self.class_names, self._split["data"], self._left_out.tolist())
        return digest(data), self._split["times"]


def _positions(
    rows: Integer[np.ndarray, "x"] | range, wanted: Sequence[int]
) -> Int[np.ndarray, "_"]:
    """The positions of those of the wanted rows that are in a split."""
    if isinstance(rows, range) or not len(wanted):
        return np.array(wanted, np.int64)
    found = np.searchsorted(rows, np.array(wanted, np.uint32))
    return found[rows[np.minimum(found, len(rows) - 1)] == wanted]


class FileSource(TableSource):
    """A split of a table of image files, which are read when they are needed."""

    def __init__(
        self,
        name: str,
        index: str,
        split: str,
        folder: str,
        bad: Sequence[int] = (),
        *,
        keep_bad: bool = True,
    ):
        """
        Args:
            index: folder of the table.
            split: of the table.
            folder: to which the paths of the files are relative.
            bad: rows of images that cannot be read, in ascending order.
            keep_bad: keep these in the split: a reader puts other images in their place.
        """
        super().__init__(name, index, split, () if keep_bad else bad)
        self._folder, info = folder, self.index.info
        self.skipped = Skipped(
            others=tuple(str(Path(folder, path)) for path in info.get("others", ())),
            more_others=info.get("more_others", 0),
            links=tuple(str(Path(folder, path)) for path in info.get("links", ())),
            beside=tuple(os.path.normpath(Path(folder, path)) for path in info.get("beside", ())),
            more_beside=info.get("more_beside", 0),
            unreadable=frozenset(str(Path(folder, path_of(self.index, row))) for row in bad),
        )

    def path(self, index: int) -> str:
        """The path of a file."""
        return str(Path(self._folder, super().path(index)))

    def __getitem__(self, index: int) -> Example:
        path = self.path(index)
        if path in self.skipped.unreadable:
            raise UsageError(f"{path}: cannot be read as an image")
        return Example(read_bytes(path), self.labels_of(index), path)

    def _content(self, index: int) -> bytes:
        try:
            return read_bytes(self.path(index))
        except UsageError:  # it cannot be read
            return b""


def open_files(
    place: str, folder: str, index: Path, split: str, *, check: Check, on_error: OnError
) -> FileSource:
    """A split of a table of image files, after checking that they can be read.

    Args:
        place: the data set, for error messages.
        check: how the images are checked, see ``vmoe/data/check.py``.
        on_error: whether unreadable images are an error. With "replace" they are kept in the split
            "train", where another image takes their place, and left out of the others.

    Raises:
        UsageError: an image cannot be read, or none of a split can.
    """
    columns = Index(index)
    count = len(columns["sizes"])

    def file(row: int) -> ImageFile:
        path = str(Path(folder, path_of(columns, row)))
        return ImageFile(path, int(columns["sizes"][row]), int(columns["times"][row]))

    bad = unreadable(folder, file, count, check, index / "unreadable.json")
    if bad and on_error == "fail":
        reasons = [f"{file(row).path} ({reason})" for row, reason in bad.items()]
        raise UsageError(
            f"{place}: {len(bad)} of {count} images cannot be read: "
            f"{listed(reasons, LISTED, separator='; ')}. Repair or remove them; training and "
            "evaluation can also skip them with data.on_error=replace"
        )
    keep_bad = split == "train"
    source = FileSource(
        f"{place}:{split}", str(index), split, folder, tuple(sorted(bad)), keep_bad=keep_bad
    )
    if not len(source):
        raise UsageError(f"{place}: no image of the split {split!r} can be read")
    return source
