"""The way of an image from its source to the model's door."""

import numpy as np
import pytest
from PIL import Image

from vmoe.config import DataConfig, TrainConfig, ViTConfig, replace
from vmoe.data.augment import augment
from vmoe.data.crops import resize, to_float
from vmoe.data.decode import read_image
from vmoe.data.mixing import mixup
from vmoe.data.pipeline import evaluation_batches, training_batches
from vmoe.data.sources import open_source
from vmoe.errors import UsageError

CONFIG = TrainConfig(model=ViTConfig(patch_size=2, image_size=8, num_classes=10))


def test_the_digits_are_split_once_and_for_all_and_evenly() -> None:
    splits = {name: open_source("digits", name) for name in ("train", "validation", "test")}
    assert {name: len(split) for name, split in splits.items()} == {
        "train": 1257,
        "validation": 180,
        "test": 360,
    }
    rows = np.concatenate([s.images.reshape(len(s), -1) for s in splits.values()])
    assert len(np.unique(rows, axis=0)) == 1797, "an image is in two parts"
    for split in splits.values():
        share = np.bincount(split.labels) / len(split)
        np.testing.assert_allclose(share, 0.1, atol=0.01)
    assert splits["test"].images[0].sum() == 13290  # of another split this would be another image


@pytest.mark.parametrize(
    ("name", "split", "message"),
    [("digit", "test", "did you mean 'digits'"), ("digits", "tests", "did you mean 'test'")],
)
def test_a_wrong_data_set_or_split_is_answered_with_the_right_one(
    name: str, split: str, message: str
) -> None:
    with pytest.raises(UsageError, match=message):
        open_source(name, split)


def test_a_training_batch_follows_from_its_number_alone() -> None:
    source = open_source("digits", "train")
    config = replace(CONFIG, data=DataConfig(shift=1, rotate=10.0, mixup=0.5))
    one, other = (training_batches(source, config) for _ in range(2))
    for step in (0, 1, 45, 1000):
        for x, y in zip(one[step], other[step], strict=True):
            np.testing.assert_array_equal(x, y)
    assert (one[0].images != one[1].images).any()
    assert (training_batches(source, replace(config, seed=1))[0].images != one[0].images).any()


def test_an_epoch_shows_every_image_once_and_each_epoch_has_its_own_order() -> None:
    source = open_source("digits", "validation")
    batches = training_batches(source, replace(CONFIG, batch_size=20))
    epochs = [np.concatenate([batches[i].images for i in range(s, s + 9)]) for s in (0, 9)]
    expected = np.unique(to_float(source.images), axis=0)
    for epoch in epochs:
        np.testing.assert_array_equal(np.unique(epoch, axis=0), expected)
    assert (epochs[0] != epochs[1]).any()


@pytest.mark.parametrize("batch_size", [1, 64, 360, 500])
def test_an_evaluation_sees_every_image_once_at_any_batch_size(batch_size: int) -> None:
    source = open_source("digits", "test")
    batches = list(evaluation_batches(source, batch_size=batch_size, num_classes=12, image_size=8))
    assert {len(batch.images) for batch in batches} == {batch_size}
    valid = np.concatenate([batch.valid for batch in batches])
    images = np.concatenate([batch.images for batch in batches])[valid]
    labels = np.concatenate([batch.labels for batch in batches])[valid]
    np.testing.assert_array_equal(images, to_float(source.images))
    np.testing.assert_array_equal(labels.argmax(1), source.labels)


def test_classes_that_do_not_fit_and_too_large_batches_are_refused() -> None:
    source = open_source("digits", "train")
    for change, message in [
        (dict(model=dict(num_classes=9)), "has 10 classes, model.num_classes=9: raise it"),
        (dict(batch_size=2000), "batch_size=2000 is more than the 1257"),
    ]:
        with pytest.raises(UsageError, match=message):
            training_batches(source, replace(CONFIG, **change))


def test_pixels_become_float32_from_minus_one_to_one() -> None:
    pixels = np.array([0, 51, 255], np.uint8).reshape(1, 1, 3)
    np.testing.assert_allclose(to_float(pixels).reshape(-1), [-1, -0.6, 1], atol=1e-6)
    assert to_float(pixels).dtype == np.float32


def test_shifts_move_by_whole_pixels_in_every_direction() -> None:
    pixels = np.zeros((9, 9, 3), np.uint8)
    pixels[4, 4] = 200
    rng, seen = np.random.default_rng(0), set()
    for _ in range(200):
        moved = augment(pixels, DataConfig(shift=1), rng)
        assert moved.sum() == 600 and moved.max() == 200
        seen.add(tuple(np.argwhere(moved[..., 0])[0] - 4))
    assert seen == {(y, x) for y in (-1, 0, 1) for x in (-1, 0, 1)}


def test_rotations_turn_about_the_centre_as_pillow_does_it() -> None:
    pixels = open_source("digits", "train").images[0].repeat(4, 0).repeat(4, 1)
    for seed in range(5):
        turned = augment(pixels, DataConfig(rotate=30.0), np.random.default_rng(seed))
        angle = np.random.default_rng(seed).uniform(-30, 30)
        expected = Image.fromarray(pixels).rotate(angle, Image.Resampling.BILINEAR)
        assert np.abs(turned.astype(int) - np.asarray(expected, int)).max() <= 1


def test_mixup_mixes_each_image_with_the_next_and_its_label_likewise() -> None:
    rng = np.random.default_rng(0)
    images = rng.normal(size=(4, 2, 2, 3)).astype(np.float32)
    labels = np.eye(4, dtype=np.float32)
    for _ in range(20):
        mixed, mixed_labels = mixup(images, labels, 0.5, rng)
        weight = mixed_labels[0, 0]
        assert 0.5 <= weight <= 1
        np.testing.assert_allclose(mixed_labels.sum(1), 1, rtol=1e-6)
        np.testing.assert_allclose(mixed_labels[3], [1 - weight, 0, 0, weight], atol=1e-6)
        np.testing.assert_allclose(
            mixed[3], weight * images[3] + (1 - weight) * images[0], atol=1e-6
        )


def test_images_of_another_size_are_resized_alike_in_training_and_evaluation() -> None:
    source = open_source("digits", "validation")
    config = replace(CONFIG, batch_size=20, model=dict(image_size=16))
    expected = np.stack([resize(image, 16) for image in source.images])
    images = next(evaluation_batches(source, batch_size=180, num_classes=10, image_size=16)).images
    np.testing.assert_array_equal(images, to_float(expected))
    seen = np.concatenate([training_batches(source, config)[i].images for i in range(9)])
    np.testing.assert_array_equal(np.unique(seen, axis=0), np.unique(images, axis=0))
    pillow = Image.fromarray(source.images[0]).resize((16, 16), Image.Resampling.BILINEAR)
    np.testing.assert_array_equal(expected[0], np.asarray(pillow))


def test_every_second_image_or_so_is_mirrored() -> None:
    pixels = np.arange(48, dtype=np.uint8).reshape(4, 4, 3)
    rng = np.random.default_rng(0)
    mirrored = [augment(pixels, DataConfig(flip=True), rng)[0, 0, 0] for _ in range(400)]
    assert set(mirrored) == {pixels[0, 0, 0], pixels[0, 3, 0]}
    assert 150 < sum(first == pixels[0, 3, 0] for first in mirrored) < 250


def test_cutout_paints_one_square_that_may_reach_over_the_edge() -> None:
    pixels = np.zeros((6, 6, 3), np.uint8)
    rng, sizes = np.random.default_rng(0), set()
    for _ in range(300):
        painted = augment(pixels, DataConfig(cutout=3), rng)[..., 0] == 128
        rows, columns = painted.any(1).sum(), painted.any(0).sum()
        assert painted.sum() == rows * columns
        sizes.add((rows, columns))
    assert sizes == {(y, x) for y in (2, 3) for x in (2, 3)}
    assert pixels.sum() == 0, "the source's own pixels were painted"


@pytest.mark.parametrize(
    ("mode", "suffix"),
    [("L", "png"), ("RGBA", "png"), ("P", "png"), ("CMYK", "jpg"), ("I;16", "png"), ("1", "png")],
)
def test_image_files_of_every_kind_become_the_same_rgb(mode: str, suffix: str, tmp_path) -> None:
    grey = np.linspace(0, 255, 256).astype(np.uint8).reshape(16, 16)
    if mode == "1":
        grey = np.where(grey > 127, 255, 0).astype(np.uint8)
    if mode == "I;16":
        image = Image.fromarray(grey.astype(np.uint16) * 257)
    else:
        image = Image.fromarray(grey).convert("RGB")
        image = image.quantize(256) if mode == "P" else image.convert(mode)
    image.save(tmp_path / f"image.{suffix}", **({"quality": 100} if suffix == "jpg" else {}))
    found = read_image(tmp_path / f"image.{suffix}")
    assert found.shape == (16, 16, 3) and found.dtype == np.uint8
    off = np.abs(found.astype(int) - grey[..., None]).max()
    assert off <= {"P": 4, "CMYK": 4}.get(mode, 0), off  # quantised, or of a JPEG


def test_a_photo_is_turned_upright_as_its_exif_says(tmp_path) -> None:
    pixels = np.zeros((4, 6, 3), np.uint8)
    pixels[0] = 200  # the top row, which the camera held to the right
    exif = Image.Exif()
    exif[0x0112] = 6  # turn by 90 degrees clockwise to see it upright
    Image.fromarray(pixels).save(tmp_path / "photo.png", exif=exif)
    np.testing.assert_array_equal(read_image(tmp_path / "photo.png"), np.rot90(pixels, -1))


def test_what_is_not_a_whole_image_is_refused_by_name(tmp_path) -> None:
    rng = np.random.default_rng(0)
    whole = tmp_path / "whole.png"
    Image.fromarray(rng.integers(0, 255, (64, 64, 3), dtype=np.uint8)).save(whole)
    (tmp_path / "half.png").write_bytes(whole.read_bytes()[:2000])
    (tmp_path / "no.png").write_text("not an image")
    (tmp_path / "empty.png").touch()
    for name, message in [
        ("half.png", "cannot be read as an image"),
        ("no.png", "not an image"),
        ("empty.png", "not an image"),
        ("gone.png", "no such file"),
    ]:
        with pytest.raises(UsageError, match=rf"{name}: {message}"):
            read_image(tmp_path / name)


def test_the_parts_that_processes_read_make_the_batches_of_one() -> None:
    """Mixing aside, whose partners are those of a device: of as many devices, all is equal."""
    source = open_source("digits", "train")
    config = replace(CONFIG, batch_size=24, data=replace(CONFIG.data, mixup=0.5, rotate=5.0))
    whole = training_batches(source, config, devices=4)
    for parts in (2, 4):
        shares = [
            training_batches(source, config, share=(i, parts), devices=4 // parts)
            for i in range(parts)
        ]
        for i in (0, 3, 60):  # 60 is of the second epoch
            joined = (np.concatenate(x) for x in zip(*(s[i] for s in shares), strict=True))
            for ours, oracle in zip(joined, whole[i], strict=True):
                np.testing.assert_array_equal(ours, oracle)


def test_the_parts_of_an_evaluation_hold_every_image_once_in_as_many_batches() -> None:
    source = open_source("digits", "validation")
    sizes = dict(batch_size=48, num_classes=10, image_size=8)
    whole = list(evaluation_batches(source, **sizes))
    shares = [list(evaluation_batches(source, **sizes, share=(i, 4))) for i in range(4)]
    assert {len(share) for share in shares} == {len(whole)} == {4}
    for oracle, *parts in zip(whole, *shares, strict=True):
        for ours, values in zip(zip(*parts, strict=True), oracle, strict=True):
            np.testing.assert_array_equal(np.concatenate(ours), values)
    assert sum(batch.valid.sum() for share in shares for batch in share) == len(source) == 180
