"""Indexes on the disk: their columns, when they are built again, and the splits of large tables."""

import collections
import contextlib
import hashlib
import os
import shutil
import subprocess
import sys
import threading
import tracemalloc
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest

from tests.command import TIMEOUT
from vmoe.data.sources import index, splits
from vmoe.data.sources.index import Index, IndexWriter, cached
from vmoe.data.sources.table import TableSource, finish_table
from vmoe.errors import Failure, UsageError
from vmoe.host.cache import cache_folder


def build_numbers(folder: Path) -> None:
    with IndexWriter(folder) as writer:
        writer.append("numbers", np.arange(10))
        writer.finish()


def test_columns_hold_what_was_written_in_pieces(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    numbers, texts, ragged = rng.integers(0, 9, 300), [], list[list[int]]()
    with IndexWriter(tmp_path) as writer:
        for piece in np.array_split(np.arange(300), [0, 1, 90, 90, 250]):
            names = [f"ä{i}" * (i % 3) for i in piece]
            lists = [rng.integers(0, 9, i % 4).tolist() for i in piece]
            texts, ragged = texts + names, ragged + lists
            writer.append("numbers", numbers[piece])
            writer.append_texts("texts", names)
            values = np.array([each for row in lists for each in row], np.int32)
            writer.append_ragged("ragged", values, np.array([len(row) for row in lists], np.int64))
        opened = writer.finish(note=[1, "two"])
    assert opened.info == {"note": [1, "two"]}
    np.testing.assert_array_equal(opened["numbers"], numbers)
    assert [opened.values("texts", i).tobytes().decode() for i in range(300)] == texts
    assert [opened.values("ragged", i).tolist() for i in range(300)] == ragged


def test_a_digest_hashes_the_rows_without_a_copy_of_them(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    lengths = rng.integers(0, 80, index.CHUNK)
    values = rng.integers(0, 255, lengths.sum(), np.uint8)
    with IndexWriter(tmp_path) as writer:
        writer.append_ragged("texts", values, lengths)
        opened = writer.finish()
    chosen = rng.random(len(lengths)) < 0.99
    expected = hashlib.sha256(values[np.repeat(chosen, lengths)].tobytes())
    expected.update(lengths[chosen].tobytes())
    tracemalloc.start()
    digest = opened.digest(["texts"], np.flatnonzero(chosen))
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert digest == expected.hexdigest() and peak < 20e6, f"{peak:,} bytes"


def test_an_index_is_built_once_per_key_and_again_if_its_files_are_not_whole() -> None:
    place, built = f"test:{os.urandom(8).hex()}", list[Path]()

    def build(folder: Path) -> None:
        built.append(folder)
        build_numbers(folder)

    folder = cached(place, "a", build)
    assert cached(place, "a", build) == folder and len(built) == 1
    assert cached(place, "b", build) != folder and len(built) == 2
    whole = (folder / index.INFO).read_text()
    (folder / index.INFO).write_text("[" * 100_000)
    with pytest.raises(UsageError, match="the index of the data is gone or incomplete; run"):
        Index(folder)
    (folder / index.INFO).write_text(whole)
    for length in (72, 88):
        os.truncate(folder / "numbers.bin", length)
        with pytest.raises(UsageError, match="the index of the data is gone or incomplete; run"):
            Index(folder)
    assert cached(place, "a", build) == folder and len(Index(folder)["numbers"]) == 10
    assert cached(place, "a", build, lambda index: False) == folder and len(built) == 4
    os.utime(folder, (0, 0))
    cached(place, "c", build)
    assert not folder.exists(), "an old index of earlier data is kept"


def test_an_index_that_cannot_be_opened_is_built_again() -> None:
    place = f"test:{os.urandom(8).hex()}"
    folder = cached(place, "a", build_numbers)
    (folder / "index.json").write_text("{}")
    files = [*sorted(folder.glob("*.bin")), folder / "index.json"]
    digests = [hashlib.sha256(path.read_bytes()).hexdigest() for path in files]
    sums = (f"{digest}  {path.name}\n" for digest, path in zip(digests, files, strict=True))
    (folder / "SHA256SUMS").write_text("".join(sums))
    assert len(Index(cached(place, "a", build_numbers))["numbers"]) == 10


def test_a_damaged_index_that_is_there_when_a_build_ends_is_not_used(tmp_path: Path) -> None:
    place = f"test:{os.urandom(8).hex()}"
    folder = cached(place, "a", build_numbers)
    (folder / "numbers.bin").write_bytes(bytes(80))
    shutil.copytree(folder, tmp_path / "damaged")

    def build(target: Path) -> None:
        build_numbers(target)
        shutil.copytree(tmp_path / "damaged", folder)

    with pytest.raises(Failure, match="cannot be written .Directory not empty"):
        cached(place, "a", build)


def test_a_build_that_fails_leaves_nothing_behind() -> None:
    place = f"test:{os.urandom(8).hex()}"
    before = set((cache_folder() / "indexes").glob("*/*"))

    def build(folder: Path) -> None:
        build_numbers(folder)
        raise UsageError("a line is wrong")

    with pytest.raises(UsageError, match="a line is wrong"):
        cached(place, "a", build)
    assert set((cache_folder() / "indexes").glob("*/*")) == before


def test_all_that_build_the_same_index_at_once_can_open_it() -> None:
    start = threading.Barrier(4)

    def opened(place: str) -> Index:
        start.wait(TIMEOUT)
        return Index(cached(place, "a", build_numbers))

    with ThreadPoolExecutor(4) as threads:
        for _ in range(30):
            place = f"test:{os.urandom(8).hex()}"
            indexes = list(threads.map(opened, [place] * 4))
            assert {len(each["numbers"]) for each in indexes} == {10}
            root = cache_folder() / "indexes" / index._hash(place)
            assert {each.folder for each in indexes} == set(root.iterdir())


def test_an_index_in_use_is_kept_however_long_ago_it_was_built() -> None:
    place = f"test:{os.urandom(8).hex()}"
    folder = cached(place, "a", build_numbers)
    os.utime(folder, (0, 0))
    cached(place, "a", build_numbers)
    cached(place, "b", build_numbers)
    assert len(Index(folder)["numbers"]) == 10


def test_data_that_cannot_be_read_is_told_from_an_index_that_cannot_be_written(
    tmp_path: Path,
) -> None:
    def build(folder: Path) -> None:
        os.scandir(tmp_path / "gone")

    with pytest.raises(UsageError, match=r"/gone: cannot be read \(No such file"):
        cached(f"test:{os.urandom(8).hex()}", "a", build)

    def gone(folder: Path) -> None:
        (folder / "gone" / "numbers.bin").write_bytes(b"")

    with pytest.raises(UsageError, match=r"cannot be written \(No such file .*make room"):
        cached(f"test:{os.urandom(8).hex()}", "a", gone)


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="Linux has a disk that is always full")
def test_a_full_disk_is_a_failure() -> None:
    def full(folder: Path) -> None:
        Path("/dev/full").write_bytes(b"1")

    with pytest.raises(Failure, match=r"cannot be written \(No space left on device\); make room"):
        cached(f"test:{os.urandom(8).hex()}", "a", full)


def test_a_cache_folder_that_cannot_be_written_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    with pytest.raises(UsageError, match="cannot be written .*; make room, or set XDG_CACHE_HOME"):
        cached("test", "a", build_numbers)


def write_table(folder: Path, labels: list[list[int]], **options: object) -> None:
    """The i-th image is named i."""
    folder.mkdir()
    with IndexWriter(folder) as writer:
        for start in range(0, len(labels), 1000):
            piece = labels[start : start + 1000]
            append_rows(writer, [str(i) for i in range(start, start + len(piece))], piece)
        finish_table(writer, tuple("abcdefgh"), place="test", **options)


def append_rows(writer: IndexWriter, names: list[str], labels: list[list[int]]) -> None:
    writer.append_texts("paths", names)
    writer.append_lists("labels", labels)
    writer.append("sizes", np.full(len(names), 7))


def rows(opened: TableSource) -> list[int]:
    return [int(opened.path(i)) for i in range(len(opened))]


FRACTIONS = {"validation": 0.1, "test": 0.1}


@pytest.mark.parametrize("chunk", [64, 1 << 18])
def test_a_split_by_hashes_in_chunks_equals_a_loop_over_classes(
    chunk: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(index, "CHUNK", chunk)
    rng = np.random.default_rng(0)
    sizes = (3, 3, 4, 5, 20, 100, 300, 565)  # the small classes lack an image in some split
    labels = rng.permutation(np.repeat(np.arange(8), sizes)).tolist()
    write_table(tmp_path / "table", [[label] for label in labels], fractions=FRACTIONS)
    hashes = splits.name_hashes([str(i) for i in range(1000)])
    expected = dict[int, str]()
    for label in range(8):
        members = sorted((i for i in range(1000) if labels[i] == label), key=lambda i: hashes[i])
        for i in members:
            share = int(hashes[i] >> np.uint64(16)) / 2**48
            expected[i] = "validation" if share < 0.1 else "test" if share < 0.2 else "train"
        for split in (*FRACTIONS, "train"):
            counts = collections.Counter(expected[i] for i in members)
            if not counts[split]:
                expected[next(i for i in members if counts[expected[i]] > 1)] = split
    for split in (*FRACTIONS, "train"):
        opened = TableSource("test", tmp_path / "table", split)
        assert rows(opened) == [i for i in range(1000) if expected[i] == split]
        assert [opened.labels_of(i) for i in range(len(opened))] == [
            (labels[i],) for i in rows(opened)
        ]


def test_building_a_table_holds_a_byte_per_image(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The labels would take 0.2 MB, and the hashes of all names 0.4 MB."""
    monkeypatch.setattr(index, "CHUNK", 250)
    with IndexWriter(tmp_path) as writer:
        for start in range(0, 50_000, 1000):
            append_rows(
                writer, [str(start + i) for i in range(1000)], [[i % 8] for i in range(1000)]
            )
        tracemalloc.start()
        finish_table(writer, tuple("abcdefgh"), place="test", fractions=FRACTIONS)
        _, peak = tracemalloc.get_traced_memory()
        tracemalloc.stop()
    assert peak < 0.2e6, f"{peak:,} bytes"


def test_rows_that_are_left_out_are_no_part_of_a_split(tmp_path: Path) -> None:
    labels = [[i % 8] for i in range(500)]
    write_table(tmp_path / "table", labels, fractions=FRACTIONS)
    write_table(tmp_path / "whole", labels)
    rng = np.random.default_rng(0)
    for split in ("train", "validation", "test", "whole"):
        folder = tmp_path / ("whole" if split == "whole" else "table")
        every = rows(TableSource("test", folder, split))
        for count in (0, 1, 30, 500):
            out = np.sort(rng.choice(500, count, replace=False)).tolist()
            opened = TableSource("test", folder, split, out)
            assert rows(opened) == [row for row in every if row not in set(out)]


def test_an_image_that_is_there_twice_is_found_in_any_part(tmp_path: Path) -> None:
    for repeated, outcome in (
        ([], contextlib.nullcontext()),
        (["17"], pytest.raises(UsageError, match="test: 17 occurs twice; list each image once")),
    ):
        (tmp_path / f"{len(repeated)}").mkdir()
        with IndexWriter(tmp_path / f"{len(repeated)}") as writer, outcome:
            for start in (0, 200):
                names = [str(i) for i in range(start, start + 200)] + repeated * (start == 200)
                append_rows(writer, names, [[0]] * len(names))
            finish_table(writer, ("a",), place="test", identity=str)


@pytest.mark.process
@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="reads Linux's own figures")
def test_a_process_holds_no_object_per_image(tmp_path: Path) -> None:
    """As tuples of names and of labels, 100,000 images would take 15 MB."""
    write_table(tmp_path / "table", [[i % 8] for i in range(100_000)], fractions=FRACTIONS)
    code = f"""
import random
from vmoe.data.sources.table import TableSource

def private():
    status = open("/proc/self/status").read()
    return int(status.split("RssAnon:")[1].split()[0])

before = private()
table = TableSource("test", {str(tmp_path / "table")!r}, "train")
for _ in range(5000):
    i = random.randrange(len(table))
    table.path(i), table.labels_of(i)
print(private() - before)
"""
    command = [sys.executable, "-W", "ignore", "-c", code]
    result = subprocess.run(command, capture_output=True, text=True, check=True)
    assert int(result.stdout) < 2000, f"{result.stdout} kB"
