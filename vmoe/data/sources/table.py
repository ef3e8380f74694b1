"""A table of labelled images on the disk: what a folder, a manifest and tar shards have in common.

Its columns are those of an index (``index.py``):

    paths    names of the images; a hash of the name decides the split where the data has none
    labels   classes of each image
    sizes    in bytes
    and what else the source needs, such as times or offsets
    rows_SPLIT   the rows of a split, where not all rows are in one
"""

import hashlib
import itertools
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Int, Integer, Num

from vmoe.data.sources.index import CHUNK, Index, IndexWriter
from vmoe.data.sources.source import Fingerprint
from vmoe.data.sources.splits import give_every_split_one, hashed_split, name_hashes
from vmoe.errors import UsageError, unknown

MOST_SORTED = 1 << 24  # hashes in memory at once


class TableWriter:
    """Writes a table, piece by piece; a context that closes its files."""

    def __init__(self, folder: Path, identity: Callable[[str], str] | None = None):
        """
        Args:
            folder: an empty one.
            identity: gives the same text for all names of one image. If it is given, an image that
                is there twice is an error.
        """
        self._index, self._identity = IndexWriter(folder), identity
        self._count = 0

    def __enter__(self) -> "TableWriter":
        return self

    def __exit__(self, *exception: object) -> None:
        self._index.__exit__(*exception)

    def append(
        self,
        paths: Sequence[str],
        labels: Sequence[Sequence[int]],
        **columns: Num[np.ndarray, "b"],
    ) -> None:
        """Appends rows.

        Args:
            labels: the classes of each image, or numbers for ``finish`` to replace.
            columns: further columns.
        """
        self._count += len(paths)
        self._index.append_texts("paths", paths)
        self._index.append("hashes", name_hashes(paths))
        if self._identity:
            self._index.append("identities", name_hashes(list(map(self._identity, paths))))
        lengths = np.array([len(each) for each in labels], np.int64)
        values = np.fromiter(itertools.chain.from_iterable(labels), np.int32)
        self._index.append_ragged("labels", values, lengths)
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
        """Writes the splits, and what opening needs.

        Args:
            place: the data set, for error messages.
            splits: names of splits, which the column ``split`` indexes; without them all rows
                are in one split.
            fractions: by split, the fraction of the images to split off: of those of the split
                "train", or of all if there are no splits.
            classes: by which to replace the labels.
            info: JSON values for ``Index.info``.

        Raises:
            UsageError: there are no images, or too few of a class, or one twice.
        """
        if not self._count:
            raise UsageError(f"{place}: no images in it")
        if classes is not None:
            with self._index.changing("labels") as labels:
                for start in range(0, len(labels), CHUNK):
                    labels[start : start + CHUNK] = classes[labels[start : start + CHUNK]]
        index = self._index.finish()
        if self._identity:
            _check_unique(index, self._identity, place)
        fewest, most = _label_counts(index)
        names = list(splits)
        if fractions:
            single = class_names if fewest == most == 1 else ()
            names = self._split(index, names, fractions, single, place)
        if names:
            self._write_rows(names)
        for name in {"hashes", "identities", "split"} & set(self._index.columns):
            self._index.remove(name)
        index = self._index.finish()
        rows = {name: _rows(index, name) for name in names or [""]}
        info["splits"] = {
            name: {
                "count": len(each),
                "data": index.digest(("paths", "labels", "sizes"), each),
                "times": index.digest(["times"], each) if "times" in index else "",
            }
            for name, each in rows.items()
            if len(each)
        }
        self._index.finish(class_names=class_names, max_labels=max(1, most), place=place, **info)

    def _split(
        self,
        index: Index,
        stored: Sequence[str],
        fractions: Mapping[str, float],
        class_names: Sequence[str],
        place: str,
    ) -> list[str]:
        """Writes the column ``chosen`` in place of ``split``; returns the names that it indexes.

        Args:
            class_names: if given, every class is in every split.
        """
        names = [*fractions, "train", *(name for name in stored if name != "train")]
        train = len(fractions)
        codes = np.array([names.index(name) for name in stored], np.int8)
        for start in range(0, self._count, CHUNK):
            rows = slice(start, start + CHUNK)
            chosen = hashed_split(index["hashes"][rows], fractions)
            if stored:
                given = codes[index["split"][rows]]
                chosen = np.where(given == train, chosen, given)
            self._index.append("chosen", chosen)
        if "split" in self._index.columns:
            self._index.remove("split")
        if class_names:
            with self._index.changing("chosen") as changing:
                give_every_split_one(
                    changing,
                    index["hashes"],
                    index["labels"],
                    fractions,
                    class_names=class_names,
                    place=place,
                )
        self._index.rename("chosen", "split")
        return names

    def _write_rows(self, names: Sequence[str]) -> None:
        with self._index.changing("split") as chosen:
            for start in range(0, self._count, CHUNK):
                for i, name in enumerate(names):
                    rows = np.flatnonzero(chosen[start : start + CHUNK] == i) + start
                    self._index.append(f"rows_{name}", rows.astype(np.uint32))


def _label_counts(index: Index) -> tuple[int, int]:
    """The smallest and the largest number of labels of an image."""
    offsets = index["labels_offsets"]
    counts = (
        np.diff(offsets[start : start + CHUNK + 1]) for start in range(0, len(offsets) - 1, CHUNK)
    )
    fewest, most = zip(*((each.min(), each.max()) for each in counts), strict=True)
    return int(min(fewest)), int(max(most))


def _check_unique(index: Index, identity: Callable[[str], str], place: str) -> None:
    """Checks that no image is there twice, in parts that fit into memory."""
    hashes = index["identities"]
    parts = -(-len(hashes) // MOST_SORTED)
    chunks = [slice(start, start + CHUNK) for start in range(0, len(hashes), CHUNK)]
    for part in range(parts):
        some = np.sort(
            np.concatenate([each[each % parts == part] for each in (hashes[c] for c in chunks)])
        )
        for repeated in some[1:][some[1:] == some[:-1]]:
            rows = np.concatenate([np.flatnonzero(hashes[c] == repeated) + c.start for c in chunks])
            paths = [path_of(index, int(row)) for row in rows]
            if len(set(map(identity, paths))) < len(paths):
                also = next((f", also as {path}" for path in paths if path != paths[0]), "")
                raise UsageError(
                    f"{place}: {paths[0]} is there twice{also}; list each image once, with all its "
                    "labels"
                )


def _rows(index: Index, split: str) -> Integer[np.ndarray, "x"] | range:
    return index[f"rows_{split}"] if f"rows_{split}" in index else range(len(index["sizes"]))


def path_of(index: Index, row: int) -> str:
    """The name of the image in a row."""
    return os.fsdecode(index.values("paths", row).tobytes())


class Table:
    """One split of a table.

    Attributes:
        index: the columns.
        class_names: the names of the classes, in the order of the labels.
        max_labels: the largest number of labels of an image, at least 1.
    """

    def __init__(self, folder: str | Path, split: str, left_out: Sequence[int] = ()):
        """Opens a table.

        Args:
            folder: of the index.
            left_out: rows that are no part of the split, in ascending order.

        Raises:
            UsageError: the index is gone or incomplete, or has no such split.
        """
        self.index = Index(folder)
        self.class_names = tuple(self.index.info["class_names"])
        self.max_labels: int = self.index.info["max_labels"]
        splits = self.index.info["splits"]
        if "" not in splits and split not in splits:
            raise UsageError(unknown(f"{self.index.info['place']} has no split", split, [*splits]))
        self._info = splits["" if "" in splits else split]
        self._rows = _rows(self.index, split)
        self._left_out = _positions(self._rows, left_out)
        # The n-th image left out moves those behind it n places forward.
        self._shifts = self._left_out - np.arange(len(self._left_out))

    def __len__(self) -> int:
        return self._info["count"] - len(self._left_out)

    def row(self, index: int) -> int:
        """The row of the image at an index in [0, len)."""
        return int(self._rows[index + int(np.searchsorted(self._shifts, index, "right"))])

    def path(self, index: int) -> str:
        """The name of the image at an index."""
        return path_of(self.index, self.row(index))

    def labels_of(self, index: int) -> tuple[int, ...]:
        return tuple(self.index.values("labels", self.row(index)).tolist())

    def fingerprint(self, contents: Iterator[bytes]) -> Fingerprint:
        """Hashes of the class names, the columns and some contents."""
        data = repr((self.class_names, self._info["data"], self._left_out.tolist()))
        content = hashlib.sha256()
        for each in contents:
            content.update(each)
        return Fingerprint(
            hashlib.sha256(data.encode()).hexdigest(), self._info["times"], content.hexdigest()
        )


def _positions(
    rows: Integer[np.ndarray, "x"] | range, wanted: Sequence[int]
) -> Int[np.ndarray, "_"]:
    """The positions of those of the wanted rows that are in a split."""
    if isinstance(rows, range) or not len(wanted):
        return np.array(wanted, np.int64)
    found = np.searchsorted(rows, np.array(wanted, np.uint32))
    return found[rows[np.minimum(found, len(rows) - 1)] == wanted]
