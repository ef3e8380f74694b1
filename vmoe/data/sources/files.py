"""A source that reads image files when they are needed."""

import os
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

from vmoe.config.data import Check, OnError
from vmoe.data.check import unreadable
from vmoe.data.decode import ImageFile, read_bytes
from vmoe.data.sources.index import Index
from vmoe.data.sources.source import Example, Fingerprint, Skipped, sampled
from vmoe.data.sources.table import Table, path_of
from vmoe.errors import UsageError, listed

LISTED = 20  # unreadable images that an error names


class FileSource:
    """A split of a data set of image files; see ``Source``.

    Its pickle holds the path of the index, not the names of the files.
    """

    def __init__(
        self,
        name: str,
        folder: str,
        index: str,
        split: str,
        bad: Sequence[int] = (),
        *,
        keep_bad: bool = True,
    ):
        """
        Args:
            folder: to which the paths of the files are relative.
            index: folder of the table.
            split: of the table.
            bad: rows of images that cannot be read, in ascending order.
            keep_bad: keep these in the split: a reader puts other images in their place.
        """
        self._arguments = (name, folder, index, split, tuple(bad), keep_bad)
        self.name, self._folder = name, folder
        self._table = Table(index, split, () if keep_bad else bad)
        info = self._table.index.info
        self.skipped = Skipped(
            others=tuple(str(Path(folder, path)) for path in info.get("others", ())),
            more_others=info.get("more_others", 0),
            links=tuple(str(Path(folder, path)) for path in info.get("links", ())),
            beside=tuple(os.path.normpath(Path(folder, path)) for path in info.get("beside", ())),
            more_beside=info.get("more_beside", 0),
            unreadable=frozenset(str(Path(folder, path_of(self._table.index, row))) for row in bad),
        )

    @property
    def class_names(self) -> tuple[str, ...]:
        return self._table.class_names

    @property
    def max_labels(self) -> int:
        return self._table.max_labels

    def __len__(self) -> int:
        return len(self._table)

    def path(self, index: int) -> str:
        """The path of a file."""
        return str(Path(self._folder, self._table.path(index)))

    def __getitem__(self, index: int) -> Example:
        path = self.path(index)
        if path in self.skipped.unreadable:
            raise UsageError(f"{path}: cannot be read as an image")
        return Example(read_bytes(path), self.labels_of(index), path)

    def labels_of(self, index: int) -> tuple[int, ...]:
        return self._table.labels_of(index)

    def fingerprint(self) -> Fingerprint:
        """Hashes of the class names, the labels, the names, sizes and times of the files, and of
        the content of some; not of where the folder is.
        """
        return self._table.fingerprint(self._contents())

    def _contents(self) -> Iterator[bytes]:
        for i in sampled(len(self)):
            try:
                yield read_bytes(self.path(i))
            except UsageError:  # it cannot be read
                yield b""

    def __reduce__(self) -> tuple[Callable[..., "FileSource"], tuple[Any, ...]]:
        return _reopen, self._arguments


def _reopen(
    name: str, folder: str, index: str, split: str, bad: tuple[int, ...], keep_bad: bool
) -> FileSource:
    return FileSource(name, folder, index, split, bad, keep_bad=keep_bad)


def open_files(
    place: str, folder: str, index: Path, split: str, *, check: Check, on_error: OnError
) -> FileSource:
    """A split of a table of image files, after checking that they can be read.

    Args:
        place: the data set, for error messages.
        on_error: whether unreadable images are an error. With "replace" they are kept in the split
            "train", where another image takes their place, and left out of the others.

    Raises:
        UsageError: an image cannot be read, or none of a split can.
    """
    files = _Files(index, folder)
    bad = unreadable(folder, files, check, index / "unreadable.json")
    if bad and on_error == "fail":
        raise UsageError(_listed(place, {files[row].path: bad[row] for row in bad}, len(files)))
    source = FileSource(
        f"{place}:{split}", folder, str(index), split, sorted(bad), keep_bad=split == "train"
    )
    if not len(source):
        raise UsageError(f"{place}: no image of the split {split!r} can be read")
    return source


class _Files(Sequence[ImageFile]):
    """The files of a table, each made when it is asked for."""

    def __init__(self, index: Path, folder: str):
        self._index, self._folder = Index(index), folder

    def __len__(self) -> int:
        return len(self._index["sizes"])

    def __getitem__(self, row: Any) -> Any:
        path = str(Path(self._folder, path_of(self._index, row)))
        return ImageFile(path, int(self._index["sizes"][row]), int(self._index["times"][row]))


def _listed(place: str, bad: dict[str, str], count: int) -> str:
    """One line that names the unreadable images."""
    reasons = [f"{path} ({reason})" for path, reason in bad.items()]
    named = listed(reasons, LISTED, separator="; ")
    return (
        f"{place}: {len(bad)} of {count} images cannot be read: {named}. Repair or remove them; "
        "training and evaluation can also skip them with data.on_error=replace"
    )
