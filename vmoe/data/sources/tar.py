"""Tar shards in WebDataset's layout, read at random.

    tar:FOLDER                       every .tar file in a folder and its sub-folders
    tar:FOLDER/name-{000..146}.tar   shards by pattern: {A..B}, {a,b}, *, ?
    tar:FILE.json                    the shards of a ``wids-shard-index-v1``; their sizes and their
                                     numbers of examples are checked

A shard belongs to the split whose name is a word of its path below the folder, as in
``train/0001.tar`` or ``imagenet-val-07.tar``; ``splits.py`` lists the words. If no path has such a
word, a hash of the name of each example decides its split: on average 80% train, 10% validation and
10% test. If only validation is missing, it is 10% of train, also on average.

The files of an example have the same name up to the first dot of the base name, and follow each
other: one image, and its label. This is ``.cls`` with the number or the name of a class, or
``.json`` with an object whose ``label`` or ``labels`` has one or several. Other files are ignored.
A file ``classes.txt`` in the folder of the shards gives the names of the classes
(``vocabulary.py``).

    0001.jpg  0001.cls
    0002.png  0002.json

The user's cache folder holds an index of each shard, and one of all images (``index.py``), until
the size or the time of a shard changes. If shards are added, only these are read, several at once:
on a network disk almost all of the time is spent waiting for small reads. Indexing takes at most
one byte of memory for each image of all shards (``table.py``), and the headers of the shards that
are being read. A shard that changes later is detected when an image is read from it.
"""

import functools
import io
import itertools
import os
import re
import tarfile
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from vmoe.data.files import SUFFIXES, entries_below, is_folder
from vmoe.data.sources.index import Index, IndexWriter, cached, state_of
from vmoe.data.sources.source import NAMED, Example, Skipped
from vmoe.data.sources.splits import SPLITS, WORDS, resolve_split
from vmoe.data.sources.table import TableSource, finish_table
from vmoe.data.sources.vocabulary import CLASSES, Vocabulary, labels_of_json, read_class_names
from vmoe.errors import UsageError, listed, parse_json, reading
from vmoe.host.progress import tracked
from vmoe.host.retry import read_regular, retried

THREADS = 8  # that index shards
MOST_OPEN = 128  # shards that a process keeps open
BLOCK = 512  # bytes of a header; all parts of a tar file are padded to a multiple
READ = 1 << 20  # bytes read at once
MOST_LABEL_BYTES = 1 << 20  # limit of a .cls or .json file
WIDS = "wids-shard-index-v1"
REMOTE = re.compile(r"[a-z][a-z0-9+.-]*://|pipe:")  # URLs and commands that write a shard


def open_tar(path: str, split: str) -> "TarSource":
    """Opens a split of a set of shards: a folder, a pattern of files, or a JSON index."""
    place = f"tar:{path}"
    shards = _find(path, place)
    by_split = _by_split(shards.names, place)
    stored_split, fractions = resolve_split(split, list(by_split), place)
    used = by_split[stored_split] if stored_split else shards.names
    given = read_class_names(shards.root)
    states = [state_of(shards.root / name) for name in shards.names]
    classes = state_of(shards.root / CLASSES) if given else None

    index = cached(
        f"tar:{os.path.abspath(path)}:{stored_split}",
        [shards.names, shards.expected, states, classes, used],
        lambda target: _build(shards, states, used, target, place, given, fractions),
    )
    return TarSource(f"{place}:{split}", str(index), split, str(shards.root), shards.skipped)


class _Shards(NamedTuple):
    """Paths of shards.

    Attributes:
        root: the folder to which the names are relative.
        names: names of the shards.
        expected: number of examples of each shard according to an index; empty without one.
        skipped: other files in the folder.
    """

    root: Path
    names: list[str]
    expected: dict[str, int]
    skipped: Skipped = Skipped()


def _find(path: str, place: str) -> _Shards:
    if Path(path).is_dir():
        shards = _shards_below(Path(path))
    elif path.endswith(".json"):
        expected = _read_wids(Path(path), place)
        shards = _Shards(Path(path).parent, list(expected), expected)
    else:
        root = Path(re.split(r"[*?{]", path)[0] + "x").parent
        found = set[str]()
        for pattern in _braces(os.path.relpath(path, root)):
            names = [str(each.relative_to(root)) for each in root.glob(pattern) if each.is_file()]
            if not names:
                raise UsageError(f"{place}: no such file: {root / pattern}")
            found.update(names)
        shards = _Shards(root, sorted(found), {})
    if not shards.names:
        raise UsageError(f"{place}: no .tar files in it")
    return shards


def _shards_below(folder: Path) -> _Shards:
    names, others, links = list[str](), list[str](), list[str]()
    for entry in entries_below(str(folder)):
        if entry.name.endswith(".tar"):
            names.append(os.path.relpath(entry.path, folder))
        elif is_folder(entry):
            links.append(entry.path)
        elif entry.path != str(folder / CLASSES):
            others.append(entry.path)
    others.sort()
    skipped = Skipped(tuple(others[:NAMED]), tuple(sorted(links)), more_others=len(others[NAMED:]))
    return _Shards(folder, sorted(names), {}, skipped)


def _braces(pattern: str) -> list[str]:
    """Expands ``{000..012}`` and ``{a,b}`` in a pattern.

    >>> _braces("x-{08..10}-{a,b}.tar")[:3]
    ['x-08-a.tar', 'x-08-b.tar', 'x-09-a.tar']
    """
    parts = re.split(r"\{([^{}]*)\}", pattern)
    for i in range(1, len(parts), 2):
        if bounds := re.fullmatch(r"(\d+)\.\.(\d+)", parts[i]):
            first, last = bounds.groups()
            numbers = range(int(first), int(last) + 1)
            parts[i] = [str(number).zfill(len(first)) for number in numbers]
        else:
            parts[i] = parts[i].split(",")
    choices = [part if isinstance(part, list) else [part] for part in parts]
    return ["".join(each) for each in itertools.product(*choices)]


def _read_wids(file: Path, place: str) -> dict[str, int]:
    """The shards of an index, with their numbers of examples; their sizes are checked."""
    expected = dict[str, int]()
    with reading(place, f"is not a {WIDS}"):
        try:
            index: Any = parse_json(retried(place, lambda: read_regular(file)))
        except FileNotFoundError:
            raise UsageError(f"{place}: no such file") from None
        if index.get("__kind__", WIDS if index.get("wids_version") == 1 else None) != WIDS:
            raise UsageError(f"{place}: is not a {WIDS}")
        for entry in index["shardlist"]:
            shard, size = entry["url"], entry.get("filesize")
            if not isinstance(shard, str) or "\0" in shard:
                raise ValueError(f"url {shard!r}")
            if REMOTE.match(shard):
                raise UsageError(
                    f"{place}: the shard {shard!r} is not a local file; download it and put its "
                    "path into the index"
                )
            expected[os.path.normpath(shard)] = int(entry["nsamples"])
            found, _ = state_of(file.parent / shard)
            if size is not None and int(size) != found:
                raise UsageError(
                    f"{file.parent / shard}: has {found:,} bytes, not {int(size):,} as in {file}; "
                    "get it again"
                )
    return expected


def _by_split(shards: Sequence[str], place: str) -> dict[str, list[str]]:
    """The shards of each split in the paths; empty if no path has a split."""
    named: dict[str, list[str]] = {}
    for shard in shards:
        words = [WORDS[word] for word in re.split(r"[^a-z]+", shard.lower()) if word in WORDS]
        named.setdefault(words[-1] if words else "", []).append(shard)
    without = named.pop("", [])
    if named and without:
        raise UsageError(
            f"{place}: the path of {without[0]} names no split, but the path of "
            f"{next(iter(named.values()))[0]} does; name one in all or none"
        )
    return {split: named[split] for split in SPLITS if split in named}


def _build(
    shards: _Shards,
    states: Sequence[tuple[int, int]],
    used: Sequence[str],
    target: Path,
    place: str,
    given: tuple[str, ...] | None,
    fractions: Mapping[str, float],
) -> None:
    """Writes the table of the images of some shards; the classes are from all shards.

    Args:
        states: the state of each shard before it is read, so that a later change is detected.
    """
    root, names, expected, _ = shards
    state_by_name = dict(zip(names, states, strict=True))

    def indexed(shard: str) -> Path:
        path = root / shard
        build = functools.partial(_build_shard, path)
        folder = cached(f"shard:{path.absolute()}", state_of(path), build)
        count = len(Index(folder)["sizes"])
        if count != expected.get(shard, count):
            raise UsageError(
                f"{path}: has {count:,} examples, not {expected[shard]:,} as in the index; get it "
                "again"
            )
        return folder

    with ThreadPoolExecutor(THREADS) as threads:  # raises the error of the first shard with one
        folders = tracked(
            threads.map(indexed, names), f"indexing {len(names):,} shards of {root}", len(names)
        )
        folder_by_name = dict(zip(names, folders, strict=True))
    vocabulary, ends = Vocabulary(), [0]
    for folder in folder_by_name.values():
        vocabulary.numbers(Index(folder).info["words"])
    class_names, classes = vocabulary.resolve(given, place)
    with IndexWriter(target) as table:
        for shard in used:
            index = Index(folder_by_name[shard])
            ends.append(ends[-1] + len(index["sizes"]))
            numbers = classes[vocabulary.numbers(index.info["words"])].astype(np.int32)
            table.append_ragged("paths", index["paths"], np.diff(index["paths_offsets"]))
            labels = numbers[index["labels"]]
            table.append_ragged("labels", labels, np.diff(index["labels_offsets"]))
            table.append("sizes", index["sizes"])
            table.append("offsets", index["offsets"])
        finish_table(
            table,
            class_names,
            place=place,
            fractions=fractions,
            shards=list(used),
            states=[state_by_name[shard] for shard in used],
            ends=ends[1:],
        )


class TarSource(TableSource):
    """A split of a set of tar shards."""

    def __init__(self, name: str, index: str, split: str, root: str, skipped: Skipped):
        """``index`` is the folder of the table, ``root`` the one of the shards."""
        super().__init__(name, index, split)
        self.skipped, self._root = skipped, Path(root)
        self._ends = np.array(self.index.info["ends"])
        self._opened = functools.lru_cache(MOST_OPEN)(self._open)

    def __getitem__(self, index: int) -> Example:
        row = self.row(index)
        shard = int(np.searchsorted(self._ends, row, "right"))
        offset, size = int(self.index["offsets"][row]), int(self.index["sizes"][row])
        path = f"{self._root / self.index.info['shards'][shard]}: {self.path(index)}"
        opened = self._opened(shard)
        try:
            content = retried(path, lambda: os.pread(opened.number, size, offset))
        except OSError as error:
            raise UsageError(f"{path}: cannot be read ({error.strerror})") from None
        self._check_state(shard, opened.state)
        if len(content) < size:
            raise UsageError(f"{path}: the shard was truncated since it was opened")
        return Example(content, self.labels_of(index), path)

    def _open(self, shard: int) -> "_Opened":
        """An open shard, after checking that it has not changed since it was indexed."""
        path = self._root / self.index.info["shards"][shard]
        self._check_state(shard, lambda: state_of(path))
        return _Opened(path)

    def _check_state(self, shard: int, state: Callable[[], tuple[int, int]]) -> None:
        """Checks the size and the time of a shard, which may be written while it is open."""
        info = self.index.info
        if list(state()) != info["states"][shard]:
            path = self._root / info["shards"][shard]
            raise UsageError(f"{path}: has changed since it was indexed; run the command again")


class _Opened:
    """A file that stays open until nothing refers to it, so that no thread reads a closed one."""

    def __init__(self, path: Path):
        try:
            self.number = retried(path, lambda: os.open(path, os.O_RDONLY))
        except OSError as error:
            raise UsageError(f"{path}: {error.strerror}") from None

    def state(self) -> tuple[int, int]:
        """As ``state_of``, of the open file; another file may have its name now."""
        status = os.fstat(self.number)
        return status.st_size, status.st_mtime_ns

    def __del__(self) -> None:
        if hasattr(self, "number"):
            os.close(self.number)


def _build_shard(shard: Path, target: Path) -> None:
    """Writes an index of a shard: names, offsets, sizes and labels of its images.

    The labels are indices into a list of words in ``Index.info``.
    """
    try:
        examples = retried(shard, lambda: list(_examples(shard)))
    except OSError as error:
        raise UsageError(f"{shard}: {error.strerror or error}") from None
    if not examples:
        raise UsageError(f"{shard}: no images in it ({', '.join(SUFFIXES)})")
    keys, images, labels = zip(*examples, strict=True)
    for key, count in Counter(keys).items():
        if count > 1:
            raise UsageError(
                f"{shard}: {key} occurs twice; the files of an example have to follow each other"
            )
    vocabulary = Vocabulary()
    with IndexWriter(target) as index:
        index.append_texts("paths", [image.name for image in images])
        index.append("offsets", np.array([image.offset_data for image in images], np.int64))
        index.append("sizes", np.array([image.size for image in images], np.int64))
        index.append_lists("labels", list(map(vocabulary.numbers, labels)))
        index.finish(words=vocabulary.words)


_Example = tuple[str, tarfile.TarInfo, list[str]]
"""The name of an example, its image and its labels."""


def _examples(shard: Path) -> Iterator[_Example]:
    """The examples of a shard, in their order."""
    try:
        with (
            io.BufferedReader(_Positioned(shard)) as file,
            tarfile.open(mode="r:", fileobj=file, encoding="utf-8") as archive,
        ):
            key, files = "", dict[str, tarfile.TarInfo]()
            length = os.stat(shard).st_size
            for member in archive:
                if archive.offset > length:  # where the next header is expected
                    size = f"{member.size:,} bytes by its header"
                    raise tarfile.ReadError(f"{member.name} has {size}")
                folder, name = os.path.split(os.path.normpath(member.name))
                if not member.isfile() or name.startswith("."):
                    continue
                stem, _, suffix = name.partition(".")
                if os.path.join(folder, stem) != key and files:
                    yield _example(archive, shard, key, files)
                    files = {}
                key = os.path.join(folder, stem)
                if suffix.lower() in files:
                    raise UsageError(f"{shard}: {member.name} occurs twice")
                files[suffix.lower()] = member
            _check_end(shard, archive.offset)
            if files:
                yield _example(archive, shard, key, files)
    except tarfile.ReadError as error:
        raise UsageError(
            f"{shard}: truncated, compressed or no tar file ({error}); write it again, uncompressed"
        ) from None


class _Positioned(io.FileIO):
    """A file for ``tarfile``, whose ``seek`` and ``tell`` make no system call.

    There are eight for an image otherwise, each of which lets another thread take Python's lock:
    eight threads then take twice the time of one for files in the page cache.
    """

    _position = 0

    def seek(self, offset: int, whence: int = os.SEEK_SET, /) -> int:
        assert whence == os.SEEK_SET
        self._position = offset
        return offset

    def tell(self) -> int:
        return self._position

    def readinto(self, buffer: Any, /) -> int:
        count = os.preadv(self.fileno(), [buffer], self._position)
        self._position += count
        return count


def _check_end(shard: Path, offset: int) -> None:
    """Checks that the reading of a shard ended at zeros: at least one block, and nothing else.

    Zeros also fill the parts that a download has left out, and end the first of two archives that
    are joined by ``cat``: nothing that follows them would be read.
    """
    with open(shard, "rb") as file:
        file.seek(offset)
        first = file.read(BLOCK)
        if len(first) < BLOCK:
            raise UsageError(f"{shard}: truncated: its end is missing; write it again")
        if first.strip(b"\0"):
            raise UsageError(
                f"{shard}: damaged: no file begins at byte {offset:,}; get or write it again"
            )
        while piece := file.read(READ):
            if piece.strip(b"\0"):
                raise UsageError(
                    f"{shard}: data follows the zeros at byte {offset:,}, which end an archive: "
                    "get it again if it is incomplete; join archives with tar --concatenate"
                )


def _example(
    archive: tarfile.TarFile, shard: Path, key: str, files: dict[str, tarfile.TarInfo]
) -> _Example:
    images = [member for suffix, member in files.items() if f".{suffix}" in SUFFIXES]
    where = f"{shard}: {key}"
    if len(images) != 1:
        held = listed([f".{suffix}" for suffix in files], 5)
        raise UsageError(f"{where}: {len(images)} images among {held}; give it one")
    if images[0].issparse():
        raise UsageError(f"{where}: is a sparse file; write the shard again as plain files")
    if label := files.get("cls") or files.get("json"):
        if label.size > MOST_LABEL_BYTES:
            raise UsageError(f"{shard}: {label.name}: {label.size:,} bytes are no label")
        opened = archive.extractfile(label)
        assert opened is not None, "it is a file"
        read = _cls if "cls" in files else _json
        return key, images[0], read(opened.read(), f"{shard}: {label.name}")
    raise UsageError(f"{where}: no label: neither .cls nor .json")


def _cls(content: bytes, where: str) -> list[str]:
    label = content.decode(errors="replace").strip()
    if not label or "\n" in label:
        shown = repr(label[:40])
        raise UsageError(f"{where}: {shown} is not a label; give the number or name of a class")
    return [label]


def _json(content: bytes, where: str) -> list[str]:
    try:
        fields: Any = parse_json(content)
    except ValueError as error:
        raise UsageError(f"{where}: is not JSON ({error})") from None
    if isinstance(fields, dict):
        for name in ("label", "labels"):
            if name in fields:
                return labels_of_json(fields[name], where)
    raise UsageError(f"{where}: no field label or labels in it")
