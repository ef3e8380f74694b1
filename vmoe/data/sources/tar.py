"""Tar shards in WebDataset's layout, read at random.

    tar:FOLDER                       every .tar file in a folder and its sub-folders
    tar:FOLDER/name-{000..146}.tar   shards by pattern: {A..B}, {a,b}, *, ?
    tar:FILE.json                    the shards of a ``wids-shard-index-v1``; their sizes and their
                                     numbers of examples are checked

A shard belongs to the split whose name is a word of its path below the folder, as in
``train/0001.tar`` or ``imagenet-val-07.tar``; ``splits.py`` lists the words. If no path has one,
the examples are split by a hash of their names: 80% train, 10% validation, 10% test. Without shards
for validation, 10% of train is.

Labels are names or numbers of classes (``tar_shard.py``); a file ``classes.txt`` in the folder of
the shards gives the names of the classes (``vocabulary.py``).

An index of all images is in the user's cache folder (``index.py``). A shard that changes later is
noticed when it is opened; processes keep some shards open.
"""

import functools
import itertools
import os
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from vmoe.data.decode import entries_below, is_folder
from vmoe.data.progress import progress
from vmoe.data.sources.index import CHUNK, cached, state_of
from vmoe.data.sources.source import NAMED, Example, Fingerprint, Skipped, sampled
from vmoe.data.sources.splits import SPLITS, WORDS, resolve_split
from vmoe.data.sources.table import Table, TableWriter, path_of
from vmoe.data.sources.tar_shard import index_of
from vmoe.data.sources.vocabulary import CLASSES, Vocabulary, read_class_names
from vmoe.data.sources.wids import read_wids
from vmoe.errors import UsageError
from vmoe.retry import retried

MOST_OPEN = 128  # shards that a process keeps open


def open_tar(path: str, split: str) -> "TarSource":
    """Opens a split of a set of shards.

    Args:
        path: a folder, a pattern of files, or a JSON index.
        split: "train", "validation" or "test".

    Raises:
        UsageError: there are no shards or no such split; or a shard is truncated, has an example
            without a label or one twice, or another number of examples than the index says.
    """
    place = f"tar:{path}"
    shards = _find(path, place)
    by_split = _by_split(shards.names, place)
    stored_split, fractions = resolve_split(split, list(by_split), place)
    used = by_split[stored_split] if stored_split else shards.names
    given = read_class_names(shards.root)
    states = [state_of(shards.root / name) for name in shards.names]
    classes = state_of(shards.root / CLASSES) if given else None

    def build(target: Path) -> None:
        _build(shards, used, target, place, given, fractions)

    place_of_index = f"tar:{os.path.abspath(path)}:{stored_split}"
    key = [shards.names, shards.expected, states, classes, used]
    index = cached(place_of_index, key, build)
    return TarSource(f"{place}:{split}", str(shards.root), str(index), split, shards.skipped)


class _Shards(NamedTuple):
    """Paths of shards.

    Attributes:
        root: the folder to which the names are relative.
        names: of the shards.
        expected: the number of examples that an index says of each; empty if there is none.
        skipped: what else is in the folder.
    """

    root: Path
    names: list[str]
    expected: dict[str, int]
    skipped: Skipped = Skipped()


def _find(path: str, place: str) -> _Shards:
    if Path(path).is_dir():
        shards = _shards_below(Path(path))
    elif path.endswith(".json"):
        expected = read_wids(Path(path), place)
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
    """The patterns that ``{000..012}`` and ``{a,b}`` stand for.

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


def _by_split(shards: Sequence[str], place: str) -> dict[str, list[str]]:
    """The shards of each split that the paths name; empty if they name none."""
    named: dict[str, list[str]] = {}
    for shard in shards:
        words = [WORDS[word] for word in re.split(r"[^a-z]+", shard.lower()) if word in WORDS]
        named.setdefault(words[-1] if words else "", []).append(shard)
    without = named.pop("", [])
    if named and without:
        raise UsageError(
            f"{place}: the path of {without[0]} names no split, that of "
            f"{next(iter(named.values()))[0]} does; name one in all or none"
        )
    return {split: named[split] for split in SPLITS if split in named}


def _build(
    shards: _Shards,
    used: Sequence[str],
    target: Path,
    place: str,
    given: tuple[str, ...] | None,
    fractions: Mapping[str, float],
) -> None:
    """Writes the table of the images of some shards; the classes are those of all shards."""
    root, names, expected, _ = shards
    vocabulary, ends, in_split = Vocabulary(), list[int](), set(used)
    end = 0
    with TableWriter(target) as table:
        for shard in progress(names, f"indexing {len(names):,} shards of {root}", len(names)):
            index = index_of(root / shard)
            count = len(index["sizes"])
            if count != expected.get(shard, count):
                raise UsageError(
                    f"{root / shard}: has {count:,} examples, the index says "
                    f"{expected[shard]:,}; get it again"
                )
            numbers = vocabulary.numbers(index.info["words"])
            if shard not in in_split:
                continue
            end += count
            ends.append(end)
            for start in range(0, count, CHUNK):
                rows = range(start, min(start + CHUNK, count))
                table.append(
                    [path_of(index, row) for row in rows],
                    [[numbers[i] for i in index.values("labels", row)] for row in rows],
                    sizes=index["sizes"][rows.start : rows.stop],
                    offsets=index["offsets"][rows.start : rows.stop],
                )
        class_names, classes = vocabulary.resolve(given, place)
        table.finish(
            class_names,
            place=place,
            fractions=fractions,
            classes=classes,
            shards=list(used),
            states=[state_of(root / shard) for shard in used],
            ends=ends,
        )


class TarSource:
    """A split of a set of tar shards; see ``Source``."""

    def __init__(self, name: str, root: str, index: str, split: str, skipped: Skipped):
        """
        Args:
            root: to which the paths of the shards are relative.
            index: folder of the table.
            split: of the table.
            skipped: what else is in the folder.
        """
        self._arguments = (name, root, index, split, skipped)
        self.skipped = skipped
        self.name, self._root = name, Path(root)
        self._table = Table(index, split)
        self._ends = np.array(self._table.index.info["ends"])
        self._opened = functools.lru_cache(MOST_OPEN)(self._open)

    @property
    def class_names(self) -> tuple[str, ...]:
        return self._table.class_names

    @property
    def max_labels(self) -> int:
        return self._table.max_labels

    def __len__(self) -> int:
        return len(self._table)

    def __getitem__(self, index: int) -> Example:
        row = self._table.row(index)
        columns = self._table.index
        shard = int(np.searchsorted(self._ends, row, "right"))
        offset, size = int(columns["offsets"][row]), int(columns["sizes"][row])
        path = f"{self._root / columns.info['shards'][shard]}: {path_of(columns, row)}"
        opened = self._opened(shard)
        try:
            content = retried(path, lambda: os.pread(opened.number, size, offset))
        except OSError as error:
            raise UsageError(f"{path}: cannot be read ({error.strerror})") from None
        if len(content) < size:
            raise UsageError(f"{path}: the shard was truncated since it was opened")
        return Example(content, self.labels_of(index), path)

    def labels_of(self, index: int) -> tuple[int, ...]:
        return self._table.labels_of(index)

    def _open(self, shard: int) -> "_Opened":
        """An open shard, after checking that it has not changed since it was indexed."""
        info = self._table.index.info
        path = self._root / info["shards"][shard]
        if list(state_of(path)) != info["states"][shard]:
            raise UsageError(f"{path}: has changed since it was indexed; run the command again")
        return _Opened(path)

    def fingerprint(self) -> Fingerprint:
        """Hashes of the class names, the labels, the names and sizes of the images, and of the
        content of some; not of the shards that hold them.
        """
        return self._table.fingerprint(self._contents())

    def _contents(self) -> Iterator[bytes]:
        for i in sampled(len(self)):
            image = self[i].image
            assert isinstance(image, bytes)
            yield image

    def __reduce__(self) -> tuple[Callable[..., "TarSource"], tuple[Any, ...]]:
        return TarSource, self._arguments


class _Opened:
    """A file that is open until nothing refers to it, so that no thread reads a closed one."""

    def __init__(self, path: Path):
        try:
            self.number = retried(path, lambda: os.open(path, os.O_RDONLY))
        except OSError as error:
            raise UsageError(f"{path}: {error.strerror}") from None

    def __del__(self) -> None:
        if hasattr(self, "number"):
            os.close(self.number)
