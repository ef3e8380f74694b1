"""Indexes of data sets: columns of numbers in memory-mapped files in the user's cache folder.

An index has a row per example. It is built once in a temporary folder that is then renamed, so it
is complete or absent. Its key contains the names, sizes and times of the files that it describes.
Processes map its columns into memory: they share its pages, which the system may drop, and no
process has an object per example. A worker process opens the index again by its path.

For 300 million examples with paths of 40 bytes and three labels each, the columns take

    path 40 B, its offset 8 B, size 8 B, time 8 B, labels 3 x 4 B, their offset 8 B    84 B, 25 GB
    row of an example in its split, if the data set is split here                       4 B, 1.2 GB

on the disk, and nothing in the memory of a process beyond the pages that it reads. As Python
objects (a string of 89 B, a tuple of 64 B, references to both and to three numbers) they would take
50 GB or more in each process. Names of classes are Python objects: 30,000 take 3 MB. ``table.py``
states the memory that building the index of a table takes.

``SHA256SUMS`` has the SHA-256 of every file. The process that opens a data set by its name verifies
these hashes, and again only if the files change; its workers do not. At 1 GB/s this takes a tenth
of a second per million images. A damaged index is built again.
"""

import concurrent.futures
import contextlib
import functools
import hashlib
import itertools
import json
import os
import shutil
import stat
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import IO, Any, Literal

import numpy as np
from jaxtyping import Int, Integer, Num, Shaped

from vmoe.errors import Failure, UsageError, parse_json
from vmoe.host.cache import cache_folder
from vmoe.host.retry import can_pass, failure, retried
from vmoe.host.signals import temporary_folder

VERSION = 3  # of the format; an index of another version is not used
CHUNK = 1 << 18  # rows that are processed at once
INFO = "index.json"
SUMS = "SHA256SUMS"  # hashes of all files, in the format of the command sha256sum
KEPT = 7 * 24 * 3600  # seconds after its last opening for which an index of earlier data is kept


def state_of(file: str | Path) -> tuple[int, int]:
    """Size of a file in bytes, and time of its last change in nanoseconds."""
    try:
        status = retried(file, lambda: os.stat(file))
    except OSError as error:
        raise UsageError(f"{file}: {error.strerror}") from None
    if not stat.S_ISREG(status.st_mode):
        raise UsageError(f"{file}: not a regular file")
    return status.st_size, status.st_mtime_ns


def cached(
    place: str,
    key: Any,
    build: Callable[[Path], None],
    valid: Callable[["Index"], bool] = lambda index: True,
) -> Path:
    """The folder of the index of a data set; builds the index if there is none with this key.

    Args:
        place: the name of the data set, with the absolute path of its files; identifies it.
        key: anything with a ``repr`` that changes with the data.
        build: writes the index into an empty folder, with an ``IndexWriter``.
        valid: whether an index that was built earlier still describes the data.
    """
    folder = _folder(place, key)
    root, found = folder.parent, _states(folder)
    if found is not None:
        intact = _intact(folder, found)
        if not intact:
            print(f"{place}: its index in {folder} is damaged: built again", file=sys.stderr)
        with contextlib.suppress(UsageError):  # another process is replacing it
            if intact and valid(Index(folder)):
                with contextlib.suppress(OSError):  # the cache folder may be read-only
                    os.utime(folder)
                return folder
    try:
        root.mkdir(parents=True, exist_ok=True)
        if found is not None and _states(folder) == found:  # else another process has built it
            shutil.rmtree(folder, ignore_errors=True)
            with contextlib.suppress(OSError):  # it is a folder
                folder.unlink()
        with temporary_folder(prefix=".building-", dir=root) as temporary:
            with _naming_data(temporary):
                build(temporary)
            _seal(temporary, folder)
        _remove_old(root, folder)
    except OSError as error:
        kind = Failure if can_pass(error) else UsageError
        raise kind(
            f"{root}: the index of {place} cannot be written ({error.strerror or error}); make "
            "room, or set XDG_CACHE_HOME to another folder"
        ) from None
    return folder


def is_cached(place: str, key: Any) -> bool:
    """Whether ``cached`` would find an index; it builds a damaged one again."""
    return os.path.lexists(_folder(place, key))


def _folder(place: str, key: Any) -> Path:
    return cache_folder() / "indexes" / _hash(place) / _hash(repr((VERSION, key)))


_States = tuple[tuple[str, int, int, int], ...]


def _states(folder: Path) -> _States | None:
    """Names, inodes, sizes and times of the files of an index; None if there is none."""
    if not os.path.lexists(folder):
        return None
    states = list[tuple[str, int, int, int]]()
    for path in (*_sealed(folder), folder / SUMS):
        with contextlib.suppress(OSError):  # it is gone
            status = path.lstat()
            states.append((path.name, status.st_ino, status.st_size, status.st_mtime_ns))
    return tuple(states)


def _sealed(folder: Path) -> list[Path]:
    """The files of an index whose hashes are stored; files written later have none."""
    return [*sorted(folder.glob("*.bin")), folder / INFO]


@functools.lru_cache(1024)
def _intact(folder: Path, states: _States) -> bool:
    """Whether the files of an index are unchanged; reads them once per state."""
    try:
        stored = retried(folder, (folder / SUMS).read_text)
        return stored == retried(folder, lambda: _sums(folder))
    except (OSError, ValueError):
        return False


def _sums(folder: Path) -> str:
    """The content of SHA256SUMS."""

    def line(path: Path) -> str:
        with open(path, "rb") as file:
            return f"{hashlib.file_digest(file, 'sha256').hexdigest()}  {path.name}\n"

    with concurrent.futures.ThreadPoolExecutor() as threads:
        return "".join(threads.map(line, _sealed(folder)))


def _seal(temporary: Path, folder: Path) -> None:
    """Adds the hashes of its files to a complete index, and moves it to its folder."""
    (temporary / SUMS).write_text(_sums(temporary))
    for path in (*_sealed(temporary), temporary / SUMS):
        with open(path, "rb") as file:
            os.fsync(file.fileno())
    try:
        temporary.rename(folder)
    except OSError:
        found = _states(folder)
        if found is None or not _intact(folder, found):  # else another process has just built it
            raise


@contextlib.contextmanager
def _naming_data(target: Path) -> Iterator[None]:
    """Turns an error about a file outside the index into a UsageError with its path."""
    try:
        yield
    except OSError as error:
        if error.filename is None or target in Path(os.fsdecode(error.filename)).parents:
            raise
        if can_pass(error):
            raise failure(os.fsdecode(error.filename), error) from None
        raise UsageError(
            f"{os.fsdecode(error.filename)}: cannot be read ({error.strerror}); restore it, or "
            "make it readable"
        ) from None


def _remove_old(root: Path, newest: Path) -> None:
    """Removes what was not opened for some time, but the last one before the newest."""
    ages = dict[Path, float]()
    for path in root.iterdir():
        with contextlib.suppress(FileNotFoundError):  # another process has removed it
            if path != newest:
                ages[path] = time.time() - path.stat().st_mtime
    for path in sorted(ages, key=ages.__getitem__)[1:]:
        if ages[path] > KEPT:
            shutil.rmtree(path, ignore_errors=True)


def _hash(text: str) -> str:
    return hashlib.sha256(text.encode(errors="surrogateescape")).hexdigest()[:32]


class Columns:
    """The columns of an index, mapped into memory."""

    def __init__(self, columns: dict[str, np.ndarray]):
        self._columns = columns

    def __contains__(self, name: str) -> bool:
        return name in self._columns

    def __getitem__(self, name: str) -> Shaped[np.ndarray, "x"]:
        """A column of numbers; for a ragged column, the values of all rows, concatenated."""
        return self._columns[name]

    def values(self, name: str, row: int) -> Shaped[np.ndarray, "x"]:
        """The values of a row in a ragged column."""
        start, end = self._columns[f"{name}_offsets"][row : row + 2]
        return self._columns[name][start:end]

    def text(self, name: str, row: int) -> str:
        """The text in a row of a column that ``append_texts`` has written."""
        return os.fsdecode(self.values(name, row).tobytes())

    def texts(self, name: str, rows: slice) -> list[str]:
        """The texts in some rows."""
        offsets = self[f"{name}_offsets"][rows.start : rows.stop + 1]
        joined, ends = self[name][offsets[0] : offsets[-1]].tobytes(), offsets - offsets[0]
        return [os.fsdecode(joined[i:j]) for i, j in itertools.pairwise(ends.tolist())]

    def digest(self, names: Sequence[str], rows: Integer[np.ndarray, "x"] | range) -> str:
        """A hash of some columns in some rows."""
        digest = hashlib.sha256()
        for part in parts(len(rows)):
            chunk = np.asarray(rows[part], np.int64)
            for name in names:
                for values in self._chunk(name, chunk):
                    digest.update(values.data)
        return digest.hexdigest()

    def _chunk(self, name: str, rows: Int[np.ndarray, "x"]) -> Iterator[Shaped[np.ndarray, "_"]]:
        """The values of a column in some rows; for a ragged column also the length of each row."""
        if f"{name}_offsets" not in self:
            yield self[name][rows]
            return
        offsets = self[f"{name}_offsets"]
        starts, ends = offsets[rows], offsets[rows + 1]
        last = np.flatnonzero(np.append(ends[:-1] != starts[1:], True))  # of rows side by side
        first = np.append(0, last[:-1] + 1)
        for start, end in zip(starts[first].tolist(), ends[last].tolist(), strict=True):
            yield self[name][start:end]
        yield ends - starts


class Index(Columns):
    """A complete index.

    Attributes:
        folder: the folder of its files.
        info: further values that the writer has stored, such as the class names.
    """

    def __init__(self, folder: str | Path):
        """Opens an index, and checks the sizes of its files."""
        self.folder = Path(folder)
        try:
            written = retried(self.folder, lambda: parse_json((self.folder / INFO).read_text()))
            super().__init__(_map_all(self.folder, written["columns"]))
            self.info: dict[str, Any] = written["info"]
        except (OSError, ValueError, KeyError, TypeError, AttributeError):
            raise UsageError(
                f"{self.folder}: the index of the data is gone or incomplete; run the command again"
            ) from None


def parts(count: int) -> Iterator[slice]:
    """Slices of a column, for processing it in parts with little memory."""
    return (slice(start, min(start + CHUNK, count)) for start in range(0, count, CHUNK))


def _map_all(folder: Path, columns: Mapping[str, Sequence[Any]]) -> dict[str, np.ndarray]:
    """Columns by name, from the dtype and the length of each."""
    return {
        name: retried(folder, functools.partial(_mapped, folder / f"{name}.bin", dtype, count))
        for name, (dtype, count) in columns.items()
    }


def _mapped(path: Path, dtype: str, count: int, mode: Literal["r", "r+"] = "r") -> np.ndarray:
    if path.stat().st_size != count * np.dtype(dtype).itemsize:
        raise ValueError
    if not count:  # an empty file cannot be mapped
        return np.empty(0, dtype)
    return np.asarray(np.memmap(path, dtype, mode, shape=(count,)))


class IndexWriter:
    """Writes the columns of an index, piece by piece; a context manager that closes its files."""

    def __init__(self, folder: Path):
        self.folder = folder
        self._files: dict[str, IO[bytes]] = {}
        self._columns: dict[str, tuple[str, int]] = {}

    def append(self, name: str, values: Num[np.ndarray, "x"]) -> None:
        """Appends to a column; all pieces of one column have the same dtype."""
        if name not in self._files:
            self._files[name] = open(self.folder / f"{name}.bin", "wb")  # noqa: SIM115
            self._columns[name] = (values.dtype.str, 0)
        self._files[name].write(np.ascontiguousarray(values).data)
        dtype, count = self._columns[name]
        self._columns[name] = (dtype, count + len(values))

    def append_ragged(
        self, name: str, values: Num[np.ndarray, "x"], lengths: Int[np.ndarray, "b"]
    ) -> None:
        """Appends rows of several values each to a column.

        Args:
            lengths: number of values of each row.
        """
        offsets = f"{name}_offsets"
        if offsets not in self._columns:
            self.append(offsets, np.zeros(1, np.int64))
        _, start = self._columns.get(name, ("", 0))
        self.append(name, values)
        self.append(offsets, start + np.cumsum(lengths, dtype=np.int64))

    def append_lists(self, name: str, lists: Sequence[Sequence[int]]) -> None:
        """Appends rows of several numbers of 32 bits each."""
        values = np.fromiter(itertools.chain.from_iterable(lists), np.int32)
        self.append_ragged(name, values, np.array([len(each) for each in lists], np.int64))

    def append_texts(self, name: str, texts: Sequence[str]) -> None:
        """Appends texts, as bytes in the file system's encoding."""
        encoded = [os.fsencode(text) for text in texts]
        values = np.frombuffer(b"".join(encoded), np.uint8)
        self.append_ragged(name, values, np.array([len(text) for text in encoded], np.int64))

    def translate(self, name: str, numbers: Int[np.ndarray, "_"]) -> None:
        """Replaces each value i of a column by ``numbers[i]``."""
        if name in self._files:
            self._files[name].flush()
            column = _mapped(self.folder / f"{name}.bin", *self._columns[name], mode="r+")
            for part in parts(len(column)):
                column[part] = numbers[column[part]]

    def columns(self) -> Columns:
        """The columns as far as they are written; more may be appended after that."""
        for file in self._files.values():
            file.flush()
        return Columns(_map_all(self.folder, self._columns))

    def finish(self, **info: Any) -> Index:
        """Writes the metadata and ``Index.info`` (JSON values), and opens the index."""
        for file in self._files.values():
            file.flush()
        written = {"columns": self._columns, "info": info}
        (self.folder / INFO).write_text(json.dumps(written))
        return Index(self.folder)

    def __enter__(self) -> "IndexWriter":
        return self

    def __exit__(self, *exception: object) -> None:
        for file in self._files.values():
            file.close()
