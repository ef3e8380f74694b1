"""Tar shards in WebDataset's layout: their examples, and errors before training."""

import io
import json
import os
import pickle
import tarfile
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from vmoe.data.decode import decode
from vmoe.data.sources import SPLITS, Source, open_source, skipped_messages, tar
from vmoe.errors import UsageError


def jpeg(value: int) -> bytes:
    file = io.BytesIO()
    Image.fromarray(np.full((8, 8, 3), value, np.uint8)).save(file, "jpeg")
    return file.getvalue()


def write(path: Path, files: dict[str, bytes]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w") as archive:
        for name, content in files.items():
            member = tarfile.TarInfo(name)
            member.size = len(content)
            archive.addfile(member, io.BytesIO(content))
    return path


def example(number: int, label: str) -> dict[str, bytes]:
    return {f"{number:04}.jpg": jpeg(number), f"{number:04}.cls": label.encode()}


def shard(path: Path, numbers: range) -> Path:
    """Examples whose label is their number modulo 3."""
    files: dict[str, bytes] = {}
    for number in numbers:
        files |= example(number, str(number % 3))
    return write(path, files)


def numbers(source: Source) -> list[int]:
    """The numbers of the examples, read from their pixels."""
    return [int(decode(source[i].image, "").mean().round()) for i in range(len(source))]


def test_shards_in_folders_of_splits_hold_the_images_and_labels_that_were_written(
    tmp_path: Path,
) -> None:
    shard(tmp_path / "train" / "0.tar", range(50))
    shard(tmp_path / "train" / "1.tar", range(50, 90))
    shard(tmp_path / "val" / "0.tar", range(90, 99))
    train, validation = (open_source(f"tar:{tmp_path}", split) for split in SPLITS[:2])
    assert numbers(train) == list(range(90)) and numbers(validation) == list(range(90, 99))
    assert [train.labels_of(i) for i in range(90)] == [(i % 3,) for i in range(90)]
    assert train.class_names == validation.class_names == ("0", "1", "2")
    assert train[57].origin == f"{tmp_path}/train/1.tar: 0057.jpg"
    with pytest.raises(UsageError, match="no split 'test': choose from train, validation"):
        open_source(f"tar:{tmp_path}", "test")


def test_a_pattern_names_shards_which_are_split_by_name_or_by_hash(tmp_path: Path) -> None:
    for i in range(3):
        shard(tmp_path / f"a-{i:02}.tar", range(60 * i, 60 * i + 60))
    splits = [numbers(open_source(f"tar:{tmp_path}/a-{{00..02}}.tar", s)) for s in SPLITS]
    assert sorted(sum(splits, [])) == list(range(180))
    assert all(abs(len(split) - 18) < 12 for split in splits[1:])
    assert len(numbers(open_source(f"tar:{tmp_path}/a-0[01]*.tar", "train"))) < len(splits[0])
    shard(tmp_path / "x-train-0.tar", range(60))
    shard(tmp_path / "x-test-0.tar", range(60, 70))
    assert numbers(open_source(f"tar:{tmp_path}/x-*.tar", "test")) == list(range(60, 70))
    rest = [numbers(open_source(f"tar:{tmp_path}/x-*.tar", s)) for s in SPLITS[:2]]
    assert sorted(sum(rest, [])) == list(range(60)) and rest[1]
    with pytest.raises(UsageError, match="the path of a-00.tar names no split"):
        open_source(f"tar:{tmp_path}", "train")
    with pytest.raises(UsageError, match=r"no such file: .*a-03.tar"):
        open_source(f"tar:{tmp_path}/a-{{00..03}}.tar", "train")


def test_labels_are_names_several_in_json_or_numbers_with_names(tmp_path: Path) -> None:
    files = {"d/1.jpg": jpeg(1), "d/1.json": b'{"labels": ["cat", "pet"], "text": 1}'}
    files |= {"d/2.json": b'{"label": "dog"}', "d/2.PNG": jpeg(2), "d/2.txt": b"a dog"}
    files |= {"d/3.jpg": jpeg(3), "d/3.json": b'{"labels": []}', "d/._4.jpg": b"?"}
    write(tmp_path / "test.tar", files)
    source = open_source(f"tar:{tmp_path}", "test")
    assert source.class_names == ("cat", "dog", "pet") and source.max_labels == 2
    assert [source.labels_of(i) for i in range(3)] == [(0, 2), (1,), ()]
    (tmp_path / "classes.txt").write_text("pet\ndog\ncat\nowl\n")
    source = open_source(f"tar:{tmp_path}", "test")
    assert source.class_names == ("pet", "dog", "cat", "owl") and source[0].labels == (2, 0)
    (tmp_path / "classes.txt").write_text("pet\ndog\n")
    with pytest.raises(UsageError, match="classes.txt has no class 'cat'"):
        open_source(f"tar:{tmp_path}", "test")


def test_each_shard_is_indexed_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    read: list[str] = []
    build = tar._build_shard

    def counting(path: Path, target: Path) -> None:
        read.append(path.name)
        build(path, target)

    monkeypatch.setattr(tar, "_build_shard", counting)
    shard(tmp_path / "train-0.tar", range(30))
    shard(tmp_path / "train-1.tar", range(30, 60))
    source = open_source(f"tar:{tmp_path}", "train")
    shard(tmp_path / "train-2.tar", range(60, 90))
    assert len(open_source(f"tar:{tmp_path}", "train")) > len(source)
    os.utime(tmp_path / "train-0.tar", (0, 0))
    open_source(f"tar:{tmp_path}", "train")
    assert sorted(read[:2]) == ["train-0.tar", "train-1.tar"]
    assert read[2:] == ["train-2.tar", "train-0.tar"]


def test_a_slow_shard_lets_others_be_indexed_and_the_index_and_its_error_are_as_of_one_thread(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The slow shard, the first, is read when the last one has been read."""
    for i in range(4):
        shard(tmp_path / "data" / f"test-{i}.tar", range(9 * i, 9 * i + 9 - i))
    build, last = tar._build_shard, threading.Event()

    def slow(path: Path, target: Path) -> None:
        assert path.name != "test-0.tar" or last.wait(9)
        try:
            build(path, target)
        finally:
            if path.name == "test-3.tar":
                last.set()

    def opened(cache: str) -> dict[Path, bytes]:
        monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / cache))
        open_source(f"tar:{tmp_path / 'data'}", "test")
        files = (path for path in (tmp_path / cache).rglob("*") if path.is_file())
        return {path.relative_to(tmp_path / cache): path.read_bytes() for path in files}

    with monkeypatch.context() as one_at_a_time:
        one_at_a_time.setattr(tar, "THREADS", 1)
        expected = opened("one")
    monkeypatch.setattr(tar, "_build_shard", slow)
    assert opened("several") == expected and len(expected) > 4
    last.clear()
    for name in ("test-0.tar", "test-2.tar", "test-3.tar"):
        (tmp_path / "data" / name).write_bytes(b"?" * 512)
    with pytest.raises(UsageError, match=r"test-0\.tar: truncated"):
        opened("several")


def test_a_pickled_source_reopens_the_index_and_notices_a_changed_shard(tmp_path: Path) -> None:
    path = shard(tmp_path / "test.tar", range(40))
    pickled = pickle.dumps(open_source(f"tar:{tmp_path}", "test"))
    assert len(pickled) < 500
    assert numbers(pickle.loads(pickled)) == list(range(40))
    shard(path, range(3, 40))
    with pytest.raises(UsageError, match="test.tar: has changed since it was indexed"):
        pickle.loads(pickled)[0]
    path.unlink()
    with pytest.raises(UsageError, match="test.tar: No such file"):
        pickle.loads(pickled)[0]


def test_a_shard_written_in_place_is_not_read_at_the_old_places(tmp_path: Path) -> None:
    source = open_source(f"tar:{shard(tmp_path / 'test.tar', range(9))}", "test")
    assert numbers(source) == list(range(9))
    other = shard(tmp_path / "other", range(10, 19)).read_bytes()
    assert len(other) == (tmp_path / "test.tar").stat().st_size
    (tmp_path / "test.tar").write_bytes(other)
    with pytest.raises(UsageError, match="test.tar: has changed since it was indexed; run the"):
        _ = source[0]


def test_a_shard_written_in_place_while_it_is_indexed_is_not_read_at_the_old_places(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = shard(tmp_path / "test.tar", range(9))
    other, build = shard(tmp_path / "other", range(10, 19)).read_bytes(), tar._build_shard

    def written(source: Path, target: Path) -> None:
        build(source, target)
        path.write_bytes(other)

    monkeypatch.setattr(tar, "_build_shard", written)
    source = open_source(f"tar:{path}", "test")
    with pytest.raises(UsageError, match="test.tar: has changed since it was indexed; run the"):
        _ = source[0]
    monkeypatch.undo()
    assert numbers(open_source(f"tar:{path}", "test")) == list(range(10, 19))


def test_a_size_that_no_shard_can_have_is_refused_as_damage(tmp_path: Path) -> None:
    content = bytearray(shard(tmp_path / "test.tar", range(2)).read_bytes())
    header = tarfile.TarInfo("0001.jpg")
    header.size = 2**60
    start = content.index(b"0001.jpg")
    content[start : start + 512] = header.tobuf(tarfile.GNU_FORMAT)
    (tmp_path / "test.tar").write_bytes(content)
    with pytest.raises(UsageError, match="test.tar: truncated, .* 1,152,921,504,606,846,976 bytes"):
        open_source(f"tar:{tmp_path / 'test.tar'}", "test")


def test_a_pipe_with_the_name_of_a_shard_is_never_opened(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "test.tar")
    with pytest.raises(UsageError, match="test.tar: not a regular file"):
        open_source(f"tar:{tmp_path}", "test")


def test_the_shards_and_counts_of_a_wids_index_are_checked(tmp_path: Path) -> None:
    path = shard(tmp_path / "shards" / "test-0.tar", range(40))
    entry = {"url": "shards/test-0.tar", "nsamples": 40, "filesize": path.stat().st_size}

    def source(**changes: Any) -> Source:
        index = {"__kind__": "wids-shard-index-v1", "shardlist": [entry | changes]}
        (tmp_path / "index.json").write_text(json.dumps(index))
        return open_source(f"tar:{tmp_path / 'index.json'}", "test")

    assert numbers(source()) == list(range(40))
    with pytest.raises(UsageError, match="has 40 examples, not 41 as in the index"):
        source(nsamples=41)
    with pytest.raises(UsageError, match=r"test-0.tar: has [\d,]+ bytes, not 7 as in .*index.json"):
        source(filesize=7)
    assert len(source(filesize=str(entry["filesize"]), nsamples="40")) == 40
    for wrong in ({"url": 5}, {"url": "a\0.tar"}, {"filesize": "large"}, {"nsamples": [40]}):
        with pytest.raises(UsageError, match="index.json: is not a wids-shard-index-v1"):
            source(**wrong)
    for remote in ("https://host/test-0.tar", "gs://bucket/test-0.tar", "pipe:cat test-0.tar"):
        with pytest.raises(UsageError, match=f"'{remote}' is not a local file; download it"):
            source(url=remote)
    for content in ("[]", "[" * 100_000):
        (tmp_path / "index.json").write_text(content)
        with pytest.raises(UsageError, match="index.json: is not a wids-shard-index-v1"):
            open_source(f"tar:{tmp_path / 'index.json'}", "test")


def test_a_disk_that_fails_while_a_shard_is_read_is_an_error_in_one_line(tmp_path: Path) -> None:
    """A folder instead of the open file fails as such a disk does: its bytes cannot be read."""
    shard(tmp_path / "test.tar", range(4))
    source = open_source(f"tar:{tmp_path}", "test")
    source[0]
    folder = os.open(tmp_path, os.O_RDONLY)
    os.dup2(folder, source._opened(0).number)
    os.close(folder)
    with pytest.raises(UsageError, match=r"test.tar: 0001.jpg: cannot be read \(Is a directory\)"):
        source[1]


@pytest.mark.parametrize(
    ("files", "message"),
    [
        (example(1, ""), "0001.cls: '' is not a label"),
        (example(1, "-2"), "label -2 is below 0"),
        (example(1, "99999999"), "number the classes from 0"),
        ({"1.jpg": jpeg(1)}, "1: no label: neither .cls nor .json"),
        ({"1.cls": b"1"}, "1: 0 images among .cls"),
        ({"1.jpg": jpeg(1), "1.png": jpeg(1), "1.cls": b"1"}, "1: 2 images among"),
        ({"1.jpg": jpeg(1), "1.json": b"{"}, "1.json: is not JSON"),
        ({"1.jpg": jpeg(1), "1.json": b"[" * 100_000}, "1.json: is not JSON"),
        ({"1.jpg": jpeg(1), "1.json": b'{"label": 1.5}'}, "1.json: 1.5 is not a label"),
        ({"1.jpg": jpeg(1), "1.json": b'{"class": 1}'}, "no field label or labels"),
        ({"1.txt": b""}, "1: 0 images"),
        ({}, "test.tar: no images in it"),
    ],
)
def test_wrong_examples_are_refused_by_shard_and_name(
    tmp_path: Path, files: dict[str, bytes], message: str
) -> None:
    write(tmp_path / "test.tar", files)
    with pytest.raises(UsageError, match=message):
        open_source(f"tar:{tmp_path}", "test")


def test_what_is_no_shard_in_a_folder_of_shards_is_counted(tmp_path: Path) -> None:
    shard(tmp_path / "shards" / "0.tar", range(30))
    shard(tmp_path / "elsewhere" / "1.tar", range(30, 60))
    (tmp_path / "shards" / "more").symlink_to(tmp_path / "elsewhere")
    (tmp_path / "shards" / "2.tar.gz").write_bytes(b"")
    (tmp_path / "shards" / "classes.txt").write_text("a\nb\nc\n")
    assert list(skipped_messages([open_source(f"tar:{tmp_path / 'shards'}", "train")])) == [
        f"skipped 1 file that is not an image: {tmp_path}/shards/2.tar.gz",
        f"skipped 1 symbolic link to a folder: {tmp_path}/shards/more",
    ]


def test_duplicate_keys_are_refused(tmp_path: Path) -> None:
    with tarfile.open(tmp_path / "test.tar", "w") as archive:
        for name in ("1.jpg", "1.cls", "2.jpg", "2.cls", "1.jpg", "1.cls"):
            member = tarfile.TarInfo(name)
            member.size = 1
            archive.addfile(member, io.BytesIO(b"1"))
    with pytest.raises(UsageError, match="test.tar: 1 occurs twice"):
        open_source(f"tar:{tmp_path}", "test")


@pytest.mark.parametrize("size", [0.3, 0.5, -10240])
def test_a_truncated_shard_is_refused(tmp_path: Path, size: float) -> None:
    content = shard(tmp_path / "test.tar", range(40)).read_bytes()
    end = int(size * len(content)) if size > 0 else 512 * 4 * 40
    (tmp_path / "test.tar").write_bytes(content[:end])
    with pytest.raises(UsageError, match=r"test\.tar: truncated"):
        open_source(f"tar:{tmp_path}", "test")


def zeros_inside(content: bytes) -> bytes:
    return content[: 512 * 5 * 10] + bytes(1024) + content[512 * 5 * 10 :]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda content: content + content, "data follows the zeros at byte .* --concatenate"),
        (zeros_inside, "data follows the zeros at byte 25,600, .* get it again if it is"),
        (lambda content: content + b"?" * 4096, "data follows the zeros"),
        (lambda content: content[: 512 * 5 * 40] + b"?" * 4096, "no file begins at byte 102,400"),
        (lambda content: content[: 512 * (5 * 12 + 3)], "truncated: its end is missing"),
    ],
    ids=["joined by cat", "a hole", "garbage behind it", "garbage at its end", "cut at a label"],
)
def test_a_shard_with_anything_but_zeros_behind_its_end_is_refused(
    change: Callable[[bytes], bytes], message: str, tmp_path: Path
) -> None:
    content = shard(tmp_path / "test.tar", range(40)).read_bytes()
    (tmp_path / "test.tar").write_bytes(change(content))
    with pytest.raises(UsageError, match=rf"test\.tar: .*{message}"):
        open_source(f"tar:{tmp_path}", "test")
    (tmp_path / "test.tar").write_bytes(content + bytes(1 << 16))
    assert len(open_source(f"tar:{tmp_path}", "test")) == 40


def test_the_files_of_an_example_belong_together_however_their_folder_is_spelled(
    tmp_path: Path,
) -> None:
    files = {"./1.jpg": jpeg(1), "1.cls": b"1", "./2.jpg": jpeg(2), "a/../2.cls": b"0"}
    write(tmp_path / "test.tar", files)
    assert numbers(open_source(f"tar:{tmp_path}", "test")) == [1, 2]
    write(tmp_path / "test.tar", files | {"3.jpg": jpeg(3), "3.cls": b"0"} | {"1.jpg": jpeg(1)})
    with pytest.raises(UsageError, match="test.tar: 1"):
        open_source(f"tar:{tmp_path}", "test")


def test_a_compressed_shard_or_a_folder_without_shards_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="no .tar files in it"):
        open_source(f"tar:{tmp_path}", "test")
    with tarfile.open(tmp_path / "test.tar", "w:gz"):
        pass
    with pytest.raises(UsageError, match="test.tar: truncated, compressed or no tar file"):
        open_source(f"tar:{tmp_path}", "test")
