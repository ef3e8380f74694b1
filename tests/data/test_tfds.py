"""Data sets of TFDS in ArrayRecord form, written and read without TensorFlow."""

import ctypes
import io
import json
import pickle
import shutil
import subprocess
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from tests.command import TINY, vmoe
from tests.data.open_files import no_more_files
from vmoe.config.fewshot import FewShotConfig
from vmoe.data.decode import decode
from vmoe.data.pipeline import check_labeled
from vmoe.data.sources import Source, open_source
from vmoe.data.sources.tfds import TfdsSource, count_records
from vmoe.errors import Failure, UsageError
from vmoe.evaluate.fewshot import prepare
from vmoe.host import retry

SHARDS = {"train": (40, 41, 19), "test": (7, 3)}


def png(value: int) -> bytes:
    file = io.BytesIO()
    Image.fromarray(np.full((4, 4, 3), value, np.uint8)).save(file, "png")
    return file.getvalue()


def build(
    folder: Path,
    label: Any,
    labels: Any = lambda i: i % 3,
    name: str = "label",
    images: Sequence[str] = ("image",),
    others: Sequence[str] = (),
    shards: Mapping[str, Sequence[int]] = SHARDS,
    image: Callable[[int], bytes] = png,
) -> Path:
    """A data set by TFDS; all pixels of the i-th image of a split have the value i.

    Args:
        images: features with these images.
        others: Image features whose content is not an image.
        shards: by split, the number of images in each shard.
        image: the file of an image.
    """
    import tensorflow_datasets as tfds
    from array_record.python.array_record_module import ArrayRecordWriter
    from tensorflow_datasets.proto import tf_example_generated_pb2 as protos

    folder.mkdir(parents=True)
    features = tfds.features.FeaturesDict(
        {
            **{each: tfds.features.Image(encoding_format="png") for each in (*images, *others)},
            name: label,
        }
    )
    splits = []
    for split, counts in shards.items():
        template = tfds.core.ShardedFileTemplate(
            data_dir=folder, dataset_name="photos", split=split, filetype_suffix="array_record"
        )
        splits.append(
            tfds.core.SplitInfo(
                name=split, shard_lengths=list(counts), num_bytes=0, filename_template=template
            )
        )
        start = 0
        for shard, count in zip(splits[-1].filepaths, counts, strict=True):
            writer = ArrayRecordWriter(str(shard), "group_size:1")
            for i in range(start, start + count):
                example = {each: io.BytesIO(image(i)) for each in images} | {name: labels(i)}
                example |= {each: io.BytesIO(b"not an image") for each in others}
                record = features.serialize_example(features.encode_example(example))
                record = protos.Example.FromString(record)
                writer.write(record.SerializeToString(deterministic=True))  # sorts its features
            writer.close()
            start += count
    tfds.folder_dataset.write_metadata(
        data_dir=folder, features=features, split_infos=splits, check_data=False
    )
    return folder


@pytest.fixture(scope="module")
def prepared(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of data sets: photos, of three named classes."""
    from tensorflow_datasets import features

    root = tmp_path_factory.mktemp("tfds")
    build(root / "photos" / "1.2.0", features.ClassLabel(names=["cat", "dog", "owl"]))
    return root


@pytest.fixture
def photos(prepared: Path, tmp_path: Path) -> Path:
    """A copy, to be broken."""
    return shutil.copytree(prepared / "photos" / "1.2.0", tmp_path / "photos" / "1.2.0")


def values(source: Source) -> list[int]:
    return [int(decode(source[i].image, "")[0, 0, 0]) for i in range(len(source))]


def test_a_few_labels_are_read_without_an_index_of_all(
    prepared: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """An index reads every record, with its image."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    source = open_source(f"tfds:{prepared / 'photos'}", "train")
    check_labeled(source)
    source.fingerprint()
    assert source.max_labels == 1 and len(source.labels_of(5)) == 1
    assert not list(tmp_path.rglob("index.json"))
    labels = [source.labels_of(i) for _ in range(12) for i in range(len(source))]
    assert labels[: len(source)] == labels[-len(source) :]
    assert list(tmp_path.rglob("index.json"))


def test_no_record_is_read_for_labels_where_an_index_has_them(
    prepared: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    read, record = list[int](), TfdsSource._record

    def counted(source: TfdsSource, row: int) -> bytes:
        read.append(row)
        return record(source, row)

    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    source = open_source(f"tfds:{prepared / 'photos'}", "train")
    every = [source.labels_of(i) for i in range(len(source))]
    again = open_source(f"tfds:{prepared / 'photos'}", "train")
    monkeypatch.setattr(TfdsSource, "_record", counted)
    data = prepare("photos", again, again, FewShotConfig(data=("photos",), shots=(1,)))
    check_labeled(again)
    assert not read and data.test_labels.tolist() == [label for (label,) in every]


@pytest.mark.parametrize(
    ("split", "expected"),
    [
        ("train", range(90)),
        ("validation", range(90, 100)),
        ("test", range(10)),
        ("train[:100%]", range(100)),
        ("train[:99%]", range(99)),
        ("train[99%:]", range(99, 100)),
        ("train[39:83]", range(39, 83)),
        ("train[-5:]", range(95, 100)),
        ("test+train[:3]", [*range(10), 0, 1, 2]),
    ],
)
def test_splits_and_slices_are_those_of_tfds(
    prepared: Path, split: str, expected: Sequence[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TFDS_DATA_DIR", str(prepared))
    source = open_source("tfds:photos", split)
    assert values(source) == list(expected) and source.class_names == ("cat", "dog", "owl")
    assert [source[i].labels for i in range(len(source))] == [(i % 3,) for i in expected]
    assert [source.labels_of(i) for i in range(len(source))] == [(i % 3,) for i in expected]
    assert source.max_labels == 1


def test_a_data_set_is_found_by_name_version_or_path(
    prepared: Path, photos: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TFDS_DATA_DIR", str(prepared))
    folder = prepared / "photos"
    names = ["photos", "photos:1.2.0", str(folder), str(folder / "1.2.0")]
    sources = [open_source(f"tfds:{name}", "test") for name in names]
    assert len({source.fingerprint() for source in sources}) == 1
    shutil.copytree(photos, photos.with_name("1.10.0"))
    assert b"1.10.0" in pickle.dumps(open_source(f"tfds:{photos.parent}", "test"))
    for name, message in {
        "photo": "has no data set 'photo': did you mean 'photos'",
        "photos:2.0.0": "no version '2.0.0': did you mean '1.2.0'",
        "photos/small": "no data set 'photos/small'",
        str(prepared / "nothing"): "no prepared data set",
        str(prepared): "choose from tfds:.*/photos",
    }.items():
        with pytest.raises(UsageError, match=message):
            open_source(f"tfds:{name}", "test")
    monkeypatch.setenv("TFDS_DATA_DIR", str(prepared / "nothing"))
    with pytest.raises(UsageError, match="no data sets in .*nothing; set TFDS_DATA_DIR"):
        open_source("tfds:photos", "test")


def test_examples_have_several_labels_or_none(tmp_path: Path) -> None:
    from tensorflow_datasets import features

    several = features.Sequence(features.ClassLabel(num_classes=5))
    folder = build(tmp_path / "real", several, lambda i: list(range(i % 4)), "real_label")
    source = open_source(f"tfds:{folder}", "test")
    assert source.max_labels == 3 and source.class_names == tuple("01234")
    assert [source.labels_of(i) for i in range(10)] == [tuple(range(i % 4)) for i in range(10)]
    assert [source[i].labels for i in range(10)] == [source.labels_of(i) for i in range(10)]
    single = features.ClassLabel(num_classes=5)
    folder = build(tmp_path / "hidden", single, lambda i: -1)
    assert open_source(f"tfds:{folder}", "test")[0].labels == ()


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="reads Linux's own figures")
def test_above_ten_million_records_no_place_of_each_is_in_memory(
    photos: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Here above 100,000: the offsets of 150,000 records would take 1.2 MB."""
    monkeypatch.setattr("vmoe.data.sources.tfds.IN_MEMORY", 100_000)
    from array_record.python.array_record_module import ArrayRecordReader, ArrayRecordWriter

    values(open_source(f"tfds:{photos}", "train"))  # starts the threads of the reader
    shard = next(photos.glob("*test*00001-of-00002"))
    record = ArrayRecordReader(str(shard)).read([0])[0]
    writer = ArrayRecordWriter(str(shard), "group_size:1,uncompressed")
    for _ in range(150_000):
        writer.write(record)
    writer.close()
    info = json.loads((photos / "dataset_info.json").read_text())
    info["splits"][1]["shardLengths"] = ["7", "150000"]
    change(photos, splits=info["splits"])
    before = private_kb()
    source = TfdsSource("photos", str(photos), "test")
    assert source[100_000].labels == source[7].labels
    grown = private_kb() - before
    assert grown < 600, f"{grown} kB"


def private_kb() -> int:
    """Memory of this process that is in use and not shared."""
    ctypes.CDLL(None).malloc_trim(0)
    status = Path("/proc/self/status").read_text()
    return int(status.split("RssAnon:")[1].split()[0])


def test_records_that_cannot_be_read_for_a_moment_are_read_again(
    photos: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    sources = [TfdsSource("photos", str(photos), "test") for _ in range(2)]
    with no_more_files(until_retry=True):
        assert sources[0][5].labels == (2,)
    monkeypatch.setattr(retry, "PAUSES", (0, 0, 0))
    shard = next(photos.glob("*test*00001-of-00002"))
    for read in (
        lambda: sources[1][5],
        lambda: count_records(str(shard)),
        lambda: open_source(f"tfds:{photos}", "test"),
    ):
        with no_more_files(), pytest.raises(Failure, match=r"now \(Too many open files\); run"):
            read()


def test_a_pickled_source_reopens_the_files(photos: Path) -> None:
    source = open_source(f"tfds:{photos}", "train[7:50]")
    pickled = pickle.dumps(source)
    assert len(pickled) < 500
    unpickled = pickle.loads(pickled)
    assert values(unpickled) == list(range(7, 50)) and unpickled.name == source.name
    assert unpickled.fingerprint() == source.fingerprint()
    assert source.fingerprint() != open_source(f"tfds:{photos}", "train[7:51]").fingerprint()


def change(photos: Path, **fields: Any) -> None:
    info = json.loads((photos / "dataset_info.json").read_text())
    (photos / "dataset_info.json").write_text(json.dumps(info | fields))


def test_a_split_may_have_another_name(photos: Path) -> None:
    info = (photos / "dataset_info.json").read_text()
    (photos / "dataset_info.json").write_text(info.replace('"test"', '"valid"'))
    for shard in photos.glob("*test*"):
        shard.rename(shard.with_name(shard.name.replace("test", "valid")))
    assert values(open_source(f"tfds:{photos}", "validation")) == list(range(10))
    assert len(open_source(f"tfds:{photos}", "train")) == 100


@pytest.mark.parametrize("split", ["train[", "valid", "train[:200%]"])
def test_splits_that_do_not_exist_are_refused(photos: Path, split: str) -> None:
    with pytest.raises(UsageError, match=r"photos/1.2.0: .*plit") as error:
        open_source(f"tfds:{photos}", split)
    assert "\n" not in str(error.value)


def test_a_run_on_a_slice_names_the_splits_of_its_evaluations(photos: Path) -> None:
    """``validation`` would be train[90%:], most of which it trains on."""
    name = f"tfds:{photos}:train[:99%]"
    result = vmoe("train", "--config", TINY, "--workdir", photos / "run", "--data.name", name)
    assert result.returncode == 2 and not (photos / "run").exists()
    assert (
        f"evaluations.data=validation with data.name={name}: both may have the same"
        in result.stderr
    )


def test_an_empty_slice_is_refused(photos: Path) -> None:
    with pytest.raises(UsageError, match=r"the split 'train\[30:10\]' has no images"):
        open_source(f"tfds:{photos}", "train[30:10]")


@pytest.mark.parametrize(
    ("form", "message"),
    [
        ("tfrecord", "stored as tfrecord, which only TensorFlow can read; .*array_record"),
        ("parquet", "stored as parquet, from which rows are lost"),
    ],
)
def test_other_forms_are_refused_with_the_remedy(photos: Path, form: str, message: str) -> None:
    change(photos, fileFormat=form)
    with pytest.raises(UsageError, match=message):
        open_source(f"tfds:{photos}", "test")


def test_another_number_of_examples_than_the_metadata_says_is_refused(photos: Path) -> None:
    info = json.loads((photos / "dataset_info.json").read_text())
    info["splits"][1]["shardLengths"] = ["7", "4"]
    change(photos, splits=info["splits"])
    with pytest.raises(UsageError, match="00001-of-00002: has 3 examples, not 4 as in"):
        open_source(f"tfds:{photos}", "test")


@pytest.mark.parametrize("share", [0.0, 0.5, 0.999])
def test_a_truncated_or_missing_shard_is_refused(photos: Path, share: float) -> None:
    shard = next(photos.glob("*test*00001-of-00002"))
    content = shard.read_bytes()
    shard.write_bytes(content[: int(share * len(content))])
    with pytest.raises(UsageError, match="00001-of-00002: truncated or corrupt"):
        open_source(f"tfds:{photos}", "test")
    shard.unlink()
    with pytest.raises(UsageError, match="00001-of-00002: no such file"):
        open_source(f"tfds:{photos}", "test")


@pytest.mark.parametrize(
    ("images", "others"), [(["image"], ["annotation", "segmentation_mask"]), (["photo"], [])]
)
def test_the_image_is_the_feature_of_that_name_or_the_only_one_and_no_mask_is_decoded(
    images: list[str], others: list[str], tmp_path: Path
) -> None:
    import tensorflow_datasets as tfds

    label = tfds.features.ClassLabel(num_classes=3)
    source = open_source(
        f"tfds:{build(tmp_path / 'a', label, images=images, others=others)}", "test"
    )
    assert values(source) == list(range(10))
    assert [source[i].labels for i in range(10)] == [(i % 3,) for i in range(10)]


def test_none_or_several_images_without_that_name_are_refused(tmp_path: Path) -> None:
    import tensorflow_datasets as tfds

    label = tfds.features.ClassLabel(num_classes=3)
    for i, images in enumerate([[], ["left", "right"]]):
        folder = build(tmp_path / str(i), label, images=images)
        message = f"{folder}: {len(images)} of the features label.* are images; .*named 'image'"
        with pytest.raises(UsageError, match=message):
            open_source(f"tfds:{folder}", "test")


@pytest.mark.process
def test_more_shards_than_the_limit_of_open_files_are_refused(photos: Path) -> None:
    code = f"""
import resource
resource.setrlimit(resource.RLIMIT_NOFILE, (200, 200))
from vmoe.data.sources import open_source
open_source("tfds:{photos}", "test")
"""
    error = subprocess.run([sys.executable, "-c", code], stderr=subprocess.PIPE, text=True).stderr
    assert f"{photos}: its 2 shards need 258 open files, more than the limit of 200" in error


def test_features_without_an_image_or_a_class_are_refused(tmp_path: Path) -> None:
    import tensorflow_datasets as tfds

    folder = build(tmp_path / "text", tfds.features.Text(), lambda i: "cat")
    with pytest.raises(UsageError, match="text: the feature label is Text.*ClassLabel"):
        open_source(f"tfds:{folder}", "test")
    folder = build(tmp_path / "other", tfds.features.ClassLabel(num_classes=3), name="class")
    with pytest.raises(UsageError, match="other: none of the features class, image is a label"):
        open_source(f"tfds:{folder}", "test")


@pytest.mark.process
def test_tensorflow_is_not_imported_and_tfds_only_when_it_is_used(prepared: Path) -> None:
    code = f"""
import sys
from vmoe.data.sources import open_source
assert not {{"tensorflow_datasets", "datasets", "array_record"}} & set(sys.modules)
open_source("tfds:{prepared / "photos"}", "test")[0]
assert not {{"tensorflow", "jax"}} & set(sys.modules)
"""
    subprocess.run([sys.executable, "-c", code], check=True)
