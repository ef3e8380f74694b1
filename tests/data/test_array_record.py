"""The writer of ArrayRecord data sets: its shards, and the files that a stopped command leaves."""

import errno
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from scripts.prepare import array_record
from vmoe.data.sources import open_source
from vmoe.data.sources.tfds import count_records
from vmoe.errors import UsageError


@pytest.fixture
def writer(monkeypatch: pytest.MonkeyPatch) -> Any:
    """The module that writes data sets, with shards of 100 bytes."""
    monkeypatch.setattr(array_record, "SHARD_BYTES", 100)
    return array_record


def write_photos(writer: Any, folder: Path, read: Callable[[int], bytes]) -> list[Any]:
    """Writes 100 images of 10 bytes; returns them in the order of the data set."""
    from tensorflow_datasets import features

    names, places = [f"{i}.png" for i in range(100)], np.random.default_rng(0).permutation(100)
    split = writer.Split(names, np.full(100, 10), places, read, lambda i: {"label": i % 3})
    label = {"label": features.ClassLabel(num_classes=3)}
    writer.write(folder, "photos", label, {"train": split})
    source = open_source(f"tfds:{folder}", "train[:100%]")
    return [source[i].image for i in range(len(source))]


def test_writing_resumes_at_the_shard_where_it_was_stopped(tmp_path: Path, writer: Any) -> None:
    from tensorflow_datasets import features

    content, reads = [bytes([i]) * 10 for i in range(100)], list[int]()

    def write(stop: int, count: int = 100) -> None:
        def read(i: int) -> bytes:
            if len(reads) == stop:
                raise KeyboardInterrupt
            reads.append(i)
            return content[i]

        split = writer.Split(
            [f"{i}.png" for i in range(count)],
            np.full(count, 10),
            np.arange(count),
            read,
            lambda i: {"label": i % 3},
        )
        label = {"label": features.ClassLabel(num_classes=3)}
        writer.write(folder, "photos", label, {"train": split})

    folder = tmp_path / "photos" / "1.0.0"
    folder.mkdir(parents=True)
    (folder / ".vmoe-left").mkdir()  # left by a command that was killed
    with pytest.raises(KeyboardInterrupt):
        write(stop=37)
    with pytest.raises(UsageError, match="no prepared data set"):
        open_source(f"tfds:{tmp_path / 'photos'}", "train[:100%]")
    with pytest.raises(SystemExit, match="holds other images"):
        write(stop=1000, count=99)
    write(stop=1000)
    assert sorted(set(reads)) == list(range(100)) and len(reads) == 107  # the fourth shard twice
    source = open_source(f"tfds:{tmp_path / 'photos'}", "train[:100%]")
    assert sorted((source[i].image, source[i].labels) for i in range(100)) == [
        (content[i], (i % 3,)) for i in range(100)
    ]
    order = [source[i].image[0] for i in range(100)]
    assert 20 < sum(order[:50]) / 50 < 80, "a slice is no random sample"
    (tmp_path / "other" / "1.0.0").mkdir(parents=True)
    (tmp_path / "photos" / "1.0.0").rename(tmp_path / "other" / "1.0.0" / "old")
    with pytest.raises(SystemExit, match="holds other files"):
        writer.write(tmp_path / "other" / "1.0.0", "other", {}, {})
    (tmp_path / "other" / "1.0.0" / "plan.json").write_text('{"ima')
    with pytest.raises(SystemExit, match="holds other images; remove it"):
        writer.write(tmp_path / "other" / "1.0.0", "other", {}, {})


def test_a_data_set_whose_metadata_was_cut_short_is_not_complete_and_a_rerun_repairs_it(
    tmp_path: Path, writer: Any
) -> None:
    folder, plan = tmp_path / "photos" / "1.0.0", tmp_path / "plan.json"

    def read(i: int) -> bytes:
        shutil.copy(folder / "plan.json", plan)
        return bytes([i]) * 10

    images = write_photos(writer, folder, read)
    assert writer.is_complete(folder)
    shutil.move(plan, folder / "plan.json")  # as a kill before the metadata is whole leaves it
    (folder / "dataset_info.json").write_text("")
    assert not writer.is_complete(folder)
    assert write_photos(writer, folder, lambda i: pytest.fail("a shard is written again")) == images
    assert writer.is_complete(folder)


@pytest.mark.parametrize(
    ("size", "images", "shards"),
    [
        (0, 1, 1),
        (10**6, 100, 1),
        (10**9, 3, 3),
        (150 * 10**9, 1_281_167, 559),
        (500 << 30, 5_000_000, 2000),
        (30 * 10**12, 300_000_000, 2000),
    ],
)
def test_shards_have_256_mb_and_are_never_more_than_2000(
    size: int, images: int, shards: int
) -> None:
    assert array_record.number_of_shards(size, images) == shards


def test_few_large_shards_have_the_images_of_many_small_ones_and_are_read_in_parts(
    tmp_path: Path, writer: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    reads = list[int]()

    def read(i: int) -> bytes:
        reads.append(i)
        return bytes([i]) * 10

    small = write_photos(writer, tmp_path / "small" / "1.0.0", read)
    first = reads.copy()
    monkeypatch.setattr(writer, "MOST_SHARDS", 2)
    large = write_photos(writer, tmp_path / "large" / "1.0.0", read)
    assert len(list((tmp_path / "small").glob("*/*array_record*"))) == 10
    assert len(list((tmp_path / "large").glob("*/*array_record*"))) == 2
    assert large == small and len(set(small)) == 100
    assert reads == 2 * first, "the parts of a large shard are not those of 100 bytes"


def test_only_a_shard_that_is_missing_makes_a_data_set_incomplete(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="missing: no such file; the data set is incomplete"):
        count_records(str(tmp_path / "missing"))
    from array_record.python.array_record_module import ArrayRecordWriter

    writer = ArrayRecordWriter(str(tmp_path / "shard"), "group_size:1")
    writer.write(b"example")
    writer.close()

    def stale(path: object) -> None:
        raise OSError(errno.ESTALE, os.strerror(errno.ESTALE))

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(os, "stat", stale)  # as of a file server that restarts
        assert count_records(str(tmp_path / "shard")) == 1
