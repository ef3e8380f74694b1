"""Tables of labeled images on the disk, and the sources that read them.

Folders, manifests and tar shards are read into tables; the code for splits, labels, class names and
fingerprints is the same for all of them. The columns are stored in an index (``index.py``):

    paths    names of the images; a hash of the name decides the split if the data has none
    labels   classes of each image
    sizes    sizes in bytes
    split    split of each image, if a list has splits
    and other columns that a format needs, such as times or offsets
    rows_SPLIT   the rows of a split, if there are several splits

All columns are written piece by piece. Building a table takes 70 MB of memory and, for each image,
one byte if a hash decides the split, or at most 17 bytes if images are compared (``manifest:``);
measured with three million images. Walking a folder takes 52 more bytes for each image, 36 of them
for the path (measured with 100,000 images), so 0.8 GB for 14 million images. An open table takes
no memory (``index.py``), unless unreadable images are left out of a split: then it takes at most 8
bytes for each image of the split.
"""

import contextlib
import functools
import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Int8, Integer, UInt64

from vmoe.config.data import ImageChecks
from vmoe.data.check import known_by, unreadable
from vmoe.data.files import ImageFile, read_bytes
from vmoe.data.sources.index import Columns, Index, IndexWriter, parts
from vmoe.data.sources.source import BaseSource, Example, Skipped, digest
from vmoe.data.sources.splits import give_every_split_one, hashed_split, name_hashes, no_split
from vmoe.errors import UsageError, listed

RECORD = "unreadable.json"  # in the folder of an index
LISTED = 20  # unreadable images listed in an error


def finish_table(
    index: IndexWriter,
    class_names: tuple[str, ...],
    *,
    place: str,
    splits: Sequence[str] = (),
    fractions: Mapping[str, float] | None = None,
    identity: Callable[[str], str] | None = None,
    **info: Any,
) -> None:
    """Adds splits and metadata to an index that has the columns of a table.

    Args:
        place: the data set, for error messages.
        splits: names of splits, indexed by a column ``split`` of 8 bits; if empty, all rows are in
            one split.
        fractions: by split, the fraction of the images to split off from the split "train", or from
            all images if there are no splits.
        identity: returns the same text for all names of one image. If it is given, an image that
            occurs twice is an error.
        info: JSON values for ``Index.info``.
    """
    table = index.columns()
    if "sizes" not in table or not len(table["sizes"]):
        raise UsageError(f"{place}: no images in it")
    if identity:
        _check_unique(table, identity, place)
    lengths = (
        np.diff(table["labels_offsets"][part.start : part.stop + 1])
        for part in parts(len(table["sizes"]))
    )
    fewest, most = np.array([(each.min(), each.max()) for each in lengths]).T
    single = class_names if fewest.min() == most.max() == 1 else ()
    names = [*splits]
    chosen = table["split"] if splits else np.empty(0, np.int8)
    if fractions:
        names = [*fractions, "train", *(name for name in splits if name != "train")]
        chosen = _split_off(table, splits, names, fractions, single, place)
    for part in parts(len(chosen)):
        for i, name in enumerate(names):
            rows = part.start + np.flatnonzero(chosen[part] == i)
            index.append(f"rows_{name}", rows.astype(np.uint32))
    with_rows = index.columns()
    info["splits"] = {
        name: {
            "data": table.digest(("paths", "labels", "sizes"), rows),
            "times": table.digest(["times"], rows) if "times" in table else "",
        }
        for name in names or [""]
        if len(rows := _rows(with_rows, name))
    }
    most_labels = max(1, int(most.max()))
    index.finish(class_names=class_names, max_labels=most_labels, place=place, **info)


def _split_off(
    table: Columns,
    splits: Sequence[str],
    names: Sequence[str],
    fractions: Mapping[str, float],
    class_names: Sequence[str],
    place: str,
) -> Int8[np.ndarray, "b"]:
    """The split of each row, as an index into the names.

    Args:
        class_names: if given, every class is in every split.
    """
    train = len(fractions)
    number = np.array([names.index(name) for name in splits], np.int8)
    chosen = np.empty(len(table["sizes"]), np.int8)
    for part in parts(len(chosen)):
        chosen[part] = hashed_split(name_hashes(table.texts("paths", part)), fractions)
        if splits:
            given = number[table["split"][part]]
            chosen[part] = np.where(given == train, chosen[part], given)
    if class_names:
        give_every_split_one(
            chosen,
            lambda rows: name_hashes([table.text("paths", row) for row in rows]),
            table["labels"],
            fractions,
            class_names=class_names,
            place=place,
        )
    return chosen


def _check_unique(table: Columns, identity: Callable[[str], str], place: str) -> None:
    identities = np.empty(len(table["sizes"]), np.uint64)
    for part in parts(len(identities)):
        identities[part] = name_hashes(list(map(identity, table.texts("paths", part))))
    in_order = np.sort(identities)
    for repeated in in_order[1:][in_order[1:] == in_order[:-1]]:
        paths = [table.text("paths", int(row)) for row in np.flatnonzero(identities == repeated)]
        if len(set(map(identity, paths))) < len(paths):
            also = next((f", also as {path}" for path in paths if path != paths[0]), "")
            raise UsageError(
                f"{place}: {paths[0]} occurs twice{also}; list each image once, with all its labels"
            )


def _rows(index: Columns, split: str) -> Integer[np.ndarray, "x"] | range:
    return index[f"rows_{split}"] if f"rows_{split}" in index else range(len(index["sizes"]))


class TableSource(BaseSource):
    """One split of a table; a subclass adds reading the image of a row.

    Its pickle holds the path of the table, not the names of the images.

    Attributes:
        index: the columns.
    """

    def __init__(
        self, name: str, folder: str | Path, split: str, left_out: Sequence[int] = ()
    ) -> None:
        """Opens a table.

        Args:
            split: split of the table; ignored if all rows are in one split.
            left_out: rows to leave out of the split.
        """
        self.name, self.index = name, Index(folder)
        info = self.index.info
        self.class_names, self.max_labels = tuple(info["class_names"]), info["max_labels"]
        splits = info["splits"]
        if "" not in splits and split not in splits:
            raise no_split(info["place"], split, [*splits])
        self._split = splits["" if "" in splits else split]
        self._rows = _rows(self.index, split)
        self._left_out = np.flatnonzero(np.isin(self._rows, left_out)) if left_out else []
        if len(self._left_out):
            self._rows = np.delete(self._rows, self._left_out)

    def __len__(self) -> int:
        return len(self._rows)

    def row(self, index: int) -> int:
        """The row of the image at an index in [0, len)."""
        return int(self._rows[index])

    def path(self, index: int) -> str:
        """The name of the image at an index."""
        return self.index.text("paths", self.row(index))

    def labels_of(self, index: int) -> tuple[int, ...]:
        return tuple(self.index.values("labels", self.row(index)).tolist())

    def _description(self) -> tuple[str, str]:
        data = (self.class_names, self._split["data"], [int(i) for i in self._left_out])
        return digest(data), self._split["times"]


class FileSource(TableSource):
    """A split of a table of image files, which are read when they are needed."""

    def __init__(self, name: str, index: str, split: str, folder: str, bad: Sequence[int]):
        """
        Args:
            index: folder of the table.
            folder: the folder to which the paths of the files are relative.
            bad: rows of unreadable images. The split "train" keeps them, because a reader replaces
                them by other images.
        """
        super().__init__(name, index, split, () if split == "train" else bad)
        self._folder, info = folder, self.index.info
        self.skipped = Skipped(
            others=tuple(str(Path(folder, path)) for path in info.get("others", ())),
            more_others=info.get("more_others", 0),
            links=tuple(str(Path(folder, path)) for path in info.get("links", ())),
            beside=tuple(os.path.normpath(Path(folder, path)) for path in info.get("beside", ())),
            more_beside=info.get("more_beside", 0),
            unreadable=frozenset(str(Path(folder, self.index.text("paths", row))) for row in bad),
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


def _unchanged(folder: str, index: Path, checks: ImageChecks) -> Callable[[ImageFile], bool]:
    """Tells whether a file can be read, and has not changed, by the record of an earlier index.

    So a file that is added to a folder is checked alone. Takes 8 bytes of memory for each image.
    """

    def identities(files: Iterable[ImageFile]) -> UInt64[np.ndarray, "x"]:
        return name_hashes(["\0".join(map(str, file)) for file in files])

    def readable(record: Path) -> UInt64[np.ndarray, "x"]:
        table, bad = Index(record.parent), known_by(record, checks)
        hashes = np.empty(0 if bad is None else len(table["sizes"]), np.uint64)
        for part in parts(len(hashes)):
            columns = (table.texts("paths", part), table["sizes"][part], table["times"][part])
            rows = zip(*columns, strict=True)
            files = (ImageFile(str(Path(folder, path)), int(n), int(t)) for path, n, t in rows)
            hashes[part] = identities(files)
        return np.sort(np.delete(hashes, list(bad or ())))

    known = np.empty(0, np.uint64)
    for record in index.parent.glob(f"*/{RECORD}"):
        with contextlib.suppress(OSError, UsageError):  # another process removes it
            if record.parent != index and len(found := readable(record)) > len(known):
                known = found

    def unchanged(file: ImageFile) -> bool:
        if not len(known):
            return False
        (own,) = identities([file])
        return bool(known[min(np.searchsorted(known, own), len(known) - 1)] == own)

    return unchanged


def open_files(place: str, folder: str, index: Path, split: str, checks: ImageChecks) -> FileSource:
    """A split of a table of image files, after checking that they can be read."""
    columns = Index(index)
    count = len(columns["sizes"])

    def file(row: int) -> ImageFile:
        path = str(Path(folder, columns.text("paths", row)))
        return ImageFile(path, int(columns["sizes"][row]), int(columns["times"][row]))

    earlier = functools.partial(_unchanged, folder, index, checks)
    bad = unreadable(folder, file, count, index / RECORD, checks, earlier)
    if bad and checks.on_error == "fail":
        reasons = [f"{file(row).path} ({reason})" for row, reason in bad.items()]
        raise UsageError(
            f"{place}: {len(bad)} of {count} images cannot be read: "
            f"{listed(reasons, LISTED, separator='; ')}. Repair or remove them; a run with "
            "data.on_error=replace uses other images instead"
        ).remedied_by(**{"data.on_error": "replace"})
    source = FileSource(f"{place}:{split}", str(index), split, folder, tuple(sorted(bad)))
    if not len(source):
        raise UsageError(f"{place}: no image of the split {split!r} can be read")
    return source
