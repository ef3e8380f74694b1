"""Data sets of Hugging Face in Arrow form: images, labels, splits, and errors."""

import errno
import io
import json
import os
import pickle
import shutil
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from tests.data.open_files import no_more_files
from vmoe.data.decode import decode
from vmoe.data.sources import SPLITS, Source, open_source
from vmoe.errors import Failure, UsageError
from vmoe.host import retry

datasets = pytest.importorskip("datasets")
datasets.disable_progress_bars()


def png(value: int) -> bytes:
    file = io.BytesIO()
    Image.fromarray(np.full((4, 4, 3), value, np.uint8)).save(file, "png")
    return file.getvalue()


def data_set(labels: list[Any], feature: Any, name: str = "label") -> Any:
    """All pixels of the i-th image have the value i."""
    columns = {
        "image": [{"bytes": png(i), "path": None} for i in range(len(labels))],
        name: labels,
    }
    return datasets.Dataset.from_dict(
        columns, features=datasets.Features({"image": datasets.Image(), name: feature})
    )


def names(count: int) -> Any:
    return datasets.ClassLabel(names=[f"class {i}" for i in range(count)])


def values(source: Source) -> list[int]:
    return [int(decode(source[i].image, "")[0, 0, 0]) for i in range(len(source))]


def test_a_data_set_without_splits_is_split_in_every_ten_images(tmp_path: Path) -> None:
    data_set([i % 3 for i in range(47)], names(3)).save_to_disk(tmp_path / "hf")
    splits = [open_source(f"hf:{tmp_path / 'hf'}", split) for split in SPLITS]
    assert values(splits[1]) == [0, 13, 26, 33, 44] and values(splits[2]) == [1, 18, 24, 38]
    assert values(splits[0]) == sorted({*range(47)} - {*values(splits[1]), *values(splits[2])})
    for source in splits:
        assert source.class_names == ("class 0", "class 1", "class 2") and source.max_labels == 1
        expected = [(value % 3,) for value in values(source)]
        assert [source.labels_of(i) for i in range(len(source))] == expected
        assert [source[i].labels for i in range(len(source))] == expected
    assert len({source.fingerprint() for source in splits}) == 3


@pytest.mark.parametrize("count", [*range(13, 25), 1009])
def test_labels_in_a_cycle_of_ten_are_in_every_split_and_every_row_is_in_one(
    count: int, tmp_path: Path
) -> None:
    images = [{"bytes": b"%d" % i, "path": None} for i in range(count)]
    rows = {"image": images, "label": [i % 10 for i in range(count)]}
    features = datasets.Features({"image": datasets.Image(), "label": names(10)})
    datasets.Dataset.from_dict(rows, features=features).save_to_disk(tmp_path / "hf")
    found = list[int]()
    for split, share in {"train": 0.8, "validation": 0.1, "test": 0.1}.items():
        source = open_source(f"hf:{tmp_path / 'hf'}", split)
        own = [int(source[i].image) for i in range(len(source))]
        assert own == sorted(own) and abs(len(own) - share * count) < 2
        with pytest.raises(IndexError):
            source[len(source)]
        assert [source.labels_of(i) for i in range(len(source))] == [(i % 10,) for i in own]
        assert count < 1000 or len({i % 10 for i in own}) == 10
        found += own
    assert sorted(found) == list(range(count))


def test_a_dictionary_has_its_own_splits(tmp_path: Path) -> None:
    whole = data_set([i % 3 for i in range(60)], names(3))
    parts = {"train": whole.select(range(40)), "test": whole.select(range(40, 60))}
    datasets.DatasetDict(parts).save_to_disk(tmp_path / "hf")
    splits = [values(open_source(f"hf:{tmp_path / 'hf'}", split)) for split in SPLITS]
    assert splits[1] == [0, 13, 26, 33] and splits[2] == list(range(40, 60))
    assert sorted(splits[0] + splits[1]) == list(range(40))
    parts = {"training": parts["train"], "valid": parts["test"]}
    datasets.DatasetDict(parts).save_to_disk(tmp_path / "other")
    named = [values(open_source(f"hf:{tmp_path / 'other'}", split)) for split in SPLITS[:2]]
    assert named == [list(range(40)), list(range(40, 60))]
    datasets.DatasetDict(everything=whole).save_to_disk(tmp_path / "unknown")
    with pytest.raises(UsageError, match="no split 'train': choose from everything"):
        open_source(f"hf:{tmp_path / 'unknown'}", "train")
    datasets.DatasetDict(test=parts["valid"]).save_to_disk(tmp_path / "test")
    with pytest.raises(UsageError, match="no split 'train': choose from test"):
        open_source(f"hf:{tmp_path / 'test'}", "train")


def test_examples_have_several_labels_or_none(tmp_path: Path) -> None:
    labels = [list(range(i % 4)) for i in range(20)]
    feature = datasets.List(datasets.Value("int32"))
    data_set(labels, feature, "labels").save_to_disk(tmp_path / "hf")
    source = open_source(f"hf:{tmp_path / 'hf'}", "train")
    assert source.max_labels == 3 and source.class_names == ("0", "1", "2")
    for i, value in enumerate(values(source)):
        assert source.labels_of(i) == source[i].labels == tuple(range(value % 4))


def test_a_data_set_may_have_no_label_at_all(tmp_path: Path) -> None:
    data_set([-1] * 20, datasets.Value("int64")).save_to_disk(tmp_path / "hf")
    source = open_source(f"hf:{tmp_path / 'hf'}", "train")
    assert source.class_names == () and source[0].labels == source.labels_of(0) == ()


def test_a_pickled_source_reopens_the_files(tmp_path: Path) -> None:
    data_set([i % 3 for i in range(47)], names(3)).save_to_disk(tmp_path / "hf")
    source = open_source(f"hf:{tmp_path / 'hf'}", "train")
    pickled = pickle.dumps(source)
    assert len(pickled) < 300
    unpickled = pickle.loads(pickled)
    assert values(unpickled) == values(source)
    assert unpickled.fingerprint() == source.fingerprint()


@pytest.mark.parametrize(
    ("labels", "feature", "message"),
    [
        (["a"] * 20, "string", "the column label is .*string.*; it has to be a ClassLabel"),
        ([0.5] * 20, "float32", "the column label is .*float32"),
        ([-7] * 20, "int64", "label -7; number the classes from 0"),
        ([5_000_000] * 20, "int64", "label 5000000; number the classes from 0"),
    ],
)
def test_labels_of_a_wrong_type_or_out_of_range_are_refused(
    labels: list[Any], feature: str, message: str, tmp_path: Path
) -> None:
    data_set(labels, datasets.Value(feature)).save_to_disk(tmp_path / "hf")
    with pytest.raises(UsageError, match=message):
        open_source(f"hf:{tmp_path / 'hf'}", "train")


def test_a_label_that_its_class_label_does_not_name_is_refused(tmp_path: Path) -> None:
    whole = data_set([5] * 20, datasets.Value("int64"))
    features = datasets.Features({"image": datasets.Image(), "label": names(3)})
    whole.save_to_disk(tmp_path / "hf")
    info = tmp_path / "hf" / "dataset_info.json"
    stored = json.loads(info.read_text())
    info.write_text(json.dumps(stored | {"features": features.to_dict()}))
    with pytest.raises(UsageError, match="label 5 has no name; its ClassLabel holds 3, for labels"):
        open_source(f"hf:{tmp_path / 'hf'}", "train")


def test_missing_columns_and_images_are_refused(tmp_path: Path) -> None:
    data_set([0] * 20, names(3), "class").save_to_disk(tmp_path / "hf")
    with pytest.raises(
        UsageError, match="the columns are image, class; none is label or labels; rename"
    ):
        open_source(f"hf:{tmp_path / 'hf'}", "train")
    data_set([0] * 20, names(3)).remove_columns("image").save_to_disk(tmp_path / "none")
    with pytest.raises(UsageError, match="0 of the columns label are images; cast_column"):
        open_source(f"hf:{tmp_path / 'none'}", "train")
    one = data_set([0] * 20, names(3))
    masks = one.select_columns("image").rename_column("image", "mask").select(range(19, -1, -1))
    pair = datasets.concatenate_datasets([masks, one], axis=1)
    datasets.DatasetDict(test=pair).save_to_disk(tmp_path / "masks")
    assert values(open_source(f"hf:{tmp_path / 'masks'}", "test")) == list(range(20))
    pair.rename_column("image", "photo").save_to_disk(tmp_path / "pair")
    with pytest.raises(UsageError, match="2 of the columns .* are images; rename the one"):
        open_source(f"hf:{tmp_path / 'pair'}", "train")
    with pytest.raises(UsageError, match="no such folder"):
        open_source(f"hf:{tmp_path / 'gone'}", "train")


def test_files_that_save_to_disk_has_not_written_or_that_are_truncated_are_refused(
    tmp_path: Path,
) -> None:
    whole = data_set([i % 3 for i in range(47)], names(3))
    whole.save_to_disk(tmp_path / "hf")
    shard = next((tmp_path / "hf").glob("*.arrow"))
    content = shard.read_bytes()
    shard.write_bytes(content[: len(content) // 2])
    with pytest.raises(UsageError, match="truncated or corrupt"):
        open_source(f"hf:{tmp_path / 'hf'}", "train")
    shard.unlink()
    with pytest.raises(UsageError, match="not written by save_to_disk, or incomplete"):
        open_source(f"hf:{tmp_path / 'hf'}", "train")
    shutil.rmtree(tmp_path / "hf")
    (tmp_path / "hf").mkdir()
    whole.to_parquet(tmp_path / "hf" / "data.parquet")
    with pytest.raises(UsageError, match="not written by save_to_disk"):
        open_source(f"hf:{tmp_path / 'hf'}", "train")


def test_files_that_cannot_be_read_now_are_not_called_corrupt(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    data_set([0] * 20, names(3)).save_to_disk(tmp_path)
    assert len(open_source(f"hf:{tmp_path}", "train")) == 16  # imports what it needs
    with no_more_files(until_retry=True):
        assert len(open_source(f"hf:{tmp_path}", "train")) == 16
    monkeypatch.setattr(retry, "PAUSES", ())
    with no_more_files(), pytest.raises(Failure, match=r"cannot be read now \(Too many"):
        open_source(f"hf:{tmp_path}", "train")


def test_an_image_that_cannot_be_read_now_is_not_unreadable(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """An unreadable one would be replaced by another image, if the config says so."""
    data_set([0] * 20, names(3)).save_to_disk(tmp_path)
    source = open_source(f"hf:{tmp_path}", "train")

    def stale(data: object, row: int) -> None:
        raise OSError(errno.ESTALE, os.strerror(errno.ESTALE))

    monkeypatch.setattr(retry, "PAUSES", ())
    monkeypatch.setattr(datasets.Dataset, "__getitem__", stale)  # as of a file server that restarts
    for read in (source.__getitem__, source.labels_of):
        with pytest.raises(Failure, match=r"train\[3\]: cannot be read now \(Stale file handle\)"):
            read(3)


def test_a_damaged_example_is_named_and_columns_that_are_not_needed_are_not_read(
    tmp_path: Path,
) -> None:
    whole = data_set([0] * 20, names(3))
    whole.add_column("caption", [f"picture {i:02}" for i in range(20)]).save_to_disk(tmp_path)
    shard = next(tmp_path.glob("*.arrow"))
    content = shard.read_bytes()
    shard.write_bytes(content.replace(b"picture 03", b"\xff" * 10))
    assert values(open_source(f"hf:{tmp_path}", "train"))[1] == 3
    files = [{"bytes": png(i), "path": f"file {i:02}"} for i in range(20)]
    features = datasets.Features({"image": datasets.Image(), "label": names(3)})
    columns = {"image": files, "label": [0] * 20}
    datasets.Dataset.from_dict(columns, features=features).save_to_disk(tmp_path / "files")
    shard = next((tmp_path / "files").glob("*.arrow"))
    shard.write_bytes(shard.read_bytes().replace(b"file 03", b"\xff" * 7))
    with pytest.raises(UsageError, match=r"files:train\[1\]: cannot be read \('utf-8' codec"):
        open_source(f"hf:{tmp_path / 'files'}", "train")


def test_a_missing_package_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(UsageError, match=r"needs the package datasets: pip install 'vmoe\[hf\]'"):
        open_source(f"hf:{tmp_path}", "train")
