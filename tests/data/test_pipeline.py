"""The input pipeline: from the examples of a source to batches."""

import dataclasses
import io
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from vmoe.config import DataConfig, TrainConfig, ViTConfig, replace
from vmoe.config.preprocessing import Preprocessing
from vmoe.data.crops import resize_and_crop, to_float
from vmoe.data.pipeline import Unreadable, evaluation_batches, training_batches
from vmoe.data.sources import Example, Fingerprint, Source, open_source
from vmoe.data.sources.source import Skipped
from vmoe.errors import UsageError

CONFIG = TrainConfig(model=ViTConfig(patch_size=2, image_size=8, num_classes=10))
SMALL = Preprocessing(8)


def test_a_training_batch_depends_only_on_the_seed_and_its_number() -> None:
    source = open_source("digits", "train")
    config = replace(CONFIG, data=DataConfig(shift=1, rotate=10.0, mixup=0.5))
    one, other = (training_batches(source, config) for _ in range(2))
    for step in (0, 1, 45, 1000):
        for x, y in zip(one[step], other[step], strict=True):
            np.testing.assert_array_equal(x, y)
    assert (one[0].images != one[1].images).any()
    assert (training_batches(source, replace(config, seed=1))[0].images != one[0].images).any()


def test_every_epoch_has_each_image_once_in_a_new_order() -> None:
    source = open_source("digits", "validation")
    batches = training_batches(source, replace(CONFIG, batch_size=20))
    epochs = [np.concatenate([batches[i].images for i in range(s, s + 9)]) for s in (0, 9)]
    expected = np.unique(to_float(source.images), axis=0)
    for epoch in epochs:
        np.testing.assert_array_equal(np.unique(epoch, axis=0), expected)
    assert (epochs[0] != epochs[1]).any()


@pytest.mark.parametrize("batch_size", [1, 64, 360, 500])
def test_an_evaluation_reads_every_image_once_at_any_batch_size(batch_size: int) -> None:
    source = open_source("digits", "test")
    batches = list(
        evaluation_batches(source, batch_size=batch_size, num_classes=12, preprocessing=SMALL)
    )
    assert {len(batch.images) for batch in batches} == {batch_size}
    valid = np.concatenate([batch.valid for batch in batches])
    images = np.concatenate([batch.images for batch in batches])[valid]
    labels = np.concatenate([batch.labels for batch in batches])[valid]
    np.testing.assert_array_equal(images, to_float(source.images))
    np.testing.assert_array_equal(labels.argmax(1), source.labels)


def test_too_many_classes_and_batches_that_cannot_be_formed_are_refused() -> None:
    source = open_source("digits", "train")
    for change, message in [
        (dict(model=dict(num_classes=9)), "has 10 classes, model.num_classes=9: raise it"),
        (dict(batch_size=2000), "batch_size=2000 is more than the 1257"),
        (dict(batch_size=1, data=dict(mixup=0.5)), "data.mixup=0.5 with one image per device"),
    ]:
        with pytest.raises(UsageError, match=message):
            training_batches(source, replace(CONFIG, **change))


def test_training_and_evaluation_resize_images_in_the_same_way() -> None:
    source = open_source("digits", "validation")
    config = replace(CONFIG, batch_size=20, model=dict(image_size=16))
    expected = np.stack([resize_and_crop(image, Preprocessing(16)) for image in source.images])
    images = next(
        evaluation_batches(source, batch_size=180, num_classes=10, preprocessing=Preprocessing(16))
    ).images
    np.testing.assert_array_equal(images, to_float(expected))
    seen = np.concatenate([training_batches(source, config)[i].images for i in range(9)])
    np.testing.assert_array_equal(np.unique(seen, axis=0), np.unique(images, axis=0))


def test_the_batches_of_several_processes_concatenate_to_those_of_one() -> None:
    """The total number of devices is equal, because mixup pairs the images of one device."""
    source = open_source("digits", "train")
    config = replace(CONFIG, batch_size=24, data=replace(CONFIG.data, mixup=0.5, rotate=5.0))
    one_process = training_batches(source, config, devices=4)
    for count in (2, 4):
        shards = [
            training_batches(source, config, shard=(i, count), devices=4 // count)
            for i in range(count)
        ]
        for i in (0, 3, 60):  # 60 is in the second epoch
            joined = (np.concatenate(x) for x in zip(*(s[i] for s in shards), strict=True))
            for ours, oracle in zip(joined, one_process[i], strict=True):
                np.testing.assert_array_equal(ours, oracle)


def test_evaluating_processes_have_equal_batch_counts_and_read_every_image_once() -> None:
    source = open_source("digits", "validation")
    sizes = dict(batch_size=48, num_classes=10, preprocessing=SMALL)
    one_process = list(evaluation_batches(source, **sizes))
    shards = [list(evaluation_batches(source, **sizes, shard=(i, 4))) for i in range(4)]
    assert {len(shard) for shard in shards} == {len(one_process)} == {4}
    for oracle, *parts in zip(one_process, *shards, strict=True):
        for ours, values in zip(zip(*parts, strict=True), oracle, strict=True):
            np.testing.assert_array_equal(np.concatenate(ours), values)
    assert sum(batch.valid.sum() for shard in shards for batch in shard) == len(source) == 180


class Squares(list):
    """A custom source: PNG files in memory, of many sizes, each of a single colour."""

    name, class_names, skipped = "squares", ("dark", "light"), Skipped()

    def __init__(self) -> None:
        for i in range(20):
            file = io.BytesIO()
            Image.new("RGB", (8 + i, 30 - i), (10 * i,) * 3).save(file, "png")
            self.append(Example(file.getvalue(), i // 10, f"squares[{i}]"))

    def fingerprint(self) -> Fingerprint:
        return Fingerprint("squares", "", "")


def test_any_object_with_the_methods_of_a_source_gives_batches() -> None:
    source = Squares()
    assert isinstance(source, Source) and not isinstance([], Source)
    train = training_batches(source, replace(CONFIG, batch_size=20))[0]
    test = next(evaluation_batches(source, batch_size=20, num_classes=10, preprocessing=SMALL))
    for batch in (train, test):
        order = batch.images[:, 0, 0, 0].argsort()
        expected = np.broadcast_to(10 * np.arange(20)[:, None, None, None], (20, 8, 8, 3))
        np.testing.assert_array_equal(batch.images[order], to_float(expected.astype(np.uint8)))
        assert batch.labels[order].argmax(1).tolist() == [0] * 10 + [1] * 10


def test_shifts_are_in_pixels_of_the_resized_image() -> None:
    """Images of 16 x 16 pixels are resized to 8 x 8, then shifted."""
    large = np.random.default_rng(0).integers(1, 255, (16, 16, 3), dtype=np.uint8)
    source = Squares()
    source[:] = [Example(large, 0, "large")] * 64
    batch = training_batches(source, replace(CONFIG, batch_size=64, data=DataConfig(shift=1)))[0]
    padded = np.pad(resize_and_crop(large, SMALL), ((1, 1), (1, 1), (0, 0)))
    expected = {padded[y : y + 8, x : x + 8].tobytes() for y in range(3) for x in range(3)}
    shifted = np.round((batch.images + 1) * 127.5).astype(np.uint8)
    assert {image.tobytes() for image in shifted} == expected


def test_a_corrupt_image_is_refused_by_path_in_training_and_evaluation(tmp_path: Path) -> None:
    for name in ("cats", "dogs"):
        (tmp_path / "train" / name).mkdir(parents=True)
        for i in range(10):
            pixels = np.random.default_rng(i).integers(0, 255, (32, 32, 3), dtype=np.uint8)
            Image.fromarray(pixels).save(tmp_path / "train" / name / f"{i}.png")
    for split in ("validation", "test"):
        (tmp_path / split).symlink_to(tmp_path / "train")
    train, test = (open_source(f"folder:{tmp_path}", split) for split in ("train", "test"))
    broken = tmp_path / "train" / "cats" / "7.png"
    broken.write_bytes(broken.read_bytes()[:1000])  # after it was opened and checked
    batches = training_batches(train, replace(CONFIG, batch_size=20))
    with pytest.raises(UsageError, match="cats/7.png: cannot be read as an image"):
        _ = batches[0]
    with pytest.raises(UsageError, match="cats/7.png: cannot be read as an image"):
        list(evaluation_batches(test, batch_size=8, num_classes=2, preprocessing=SMALL))


def test_an_unreadable_image_is_replaced_by_another_that_seed_and_position_determine() -> None:
    source = Squares()
    source[7] = dataclasses.replace(source[7], image=source[7].image[:50])
    config = replace(CONFIG, batch_size=20, data=DataConfig(on_error="replace"))
    replaced = Unreadable("replaced by another image")
    first, again = (training_batches(source, config, on_replaced=replaced.add)[0] for _ in range(2))
    for ours, theirs in zip(first, again, strict=True):
        np.testing.assert_array_equal(ours, theirs)
    values = np.round((first.images[:, 0, 0, 0] + 1) * 12.75).astype(int).tolist()
    assert 7 not in values and len(set(values)) == 19 and len(values) == 20
    (line,) = replaced.news()
    assert line.startswith("squares[7]: cannot be read") and line.endswith("image (1 so far)")
    assert not replaced.news()
    whole = training_batches(Squares(), config)[0]
    same = (first.images == whole.images).all(axis=(1, 2, 3))
    assert same.sum() == 19, "other images changed"


def test_an_unreadable_image_becomes_padding_in_an_evaluation() -> None:
    source = Squares()
    source[7] = dataclasses.replace(source[7], image=source[7].image[:50])
    left_out = Unreadable("left out")
    sizes = dict(batch_size=8, num_classes=10, preprocessing=SMALL)
    batches = list(evaluation_batches(source, **sizes, on_unreadable=left_out.add))
    whole = list(evaluation_batches(Squares(), **sizes))
    valid = np.concatenate([batch.valid for batch in batches])
    assert np.flatnonzero(~valid).tolist() == [7, 20, 21, 22, 23]
    for ours, theirs in zip(batches, whole, strict=True):
        for x, y in zip(ours, theirs, strict=True):
            np.testing.assert_array_equal(x[ours.valid], y[ours.valid])
            assert not x[~ours.valid].any()
    (line,) = left_out.news()
    assert line.startswith("squares[7]: cannot be read") and line.endswith("; left out (1 so far)")
