"""The input pipeline: from the examples of a source to batches."""

import dataclasses
import io
import platform
import subprocess
import sys
import tarfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import grain
import numpy as np
import pytest
from PIL import ExifTags, Image

from tests.data.open_files import no_more_files
from vmoe.config import DataConfig, PreprocessingConfig, TrainConfig, ViTConfig, replace
from vmoe.config.data import ImageChecks
from vmoe.config.preprocessing import Preprocessing
from vmoe.data.check import unreadable
from vmoe.data.crops import resize_and_crop
from vmoe.data.decode import decode
from vmoe.data.files import image_files_below
from vmoe.data.pipeline import (
    Batch,
    empty_batch,
    evaluation_batches,
    evaluation_order,
    training_batches,
)
from vmoe.data.reading import Reading
from vmoe.data.sources import Example, Fingerprint, Source, open_source
from vmoe.data.sources.source import Skipped
from vmoe.data.unreadable import Refused, Unreadable
from vmoe.errors import Failure, UsageError
from vmoe.host import retry

CONFIG = TrainConfig(model=ViTConfig(patch_size=2, image_size=8, num_classes=10))
SMALL = Preprocessing(8)
FAULTS = """
import resource
from vmoe.config import TrainConfig, ViTConfig
from vmoe.data.pipeline import training_batches
from vmoe.data.reading import read_ahead
from vmoe.data.sources import open_source

config = TrainConfig(model=ViTConfig(image_size=224, num_classes=1000), batch_size=32)
batches = training_batches(open_source("synthetic:1000:224", "train"), config)
faults = []
with read_ahead(batches, 0, 16) as reader:
    for read in reader:
        faults.append(resource.getrusage(resource.RUSAGE_SELF).ru_minflt)
print((faults[-1] - faults[-9]) // 8)
"""


def batch_of(source: Source, config: TrainConfig, number: int = 0) -> Batch:
    return training_batches(source, config)[number].batch


def test_a_training_batch_depends_only_on_the_seed_and_its_number() -> None:
    source = open_source("digits", "train")
    config = replace(CONFIG, data=DataConfig(shift=1, rotate=10.0, crop_min_area=0.3, erasing=0.5))
    one, other = (training_batches(source, config) for _ in range(2))
    for step in (0, 1, 45, 1000):
        for x, y in zip(one[step].batch, other[step].batch, strict=True):
            np.testing.assert_array_equal(x, y)
    first = one[0].batch.images
    assert (first != one[1].batch.images).any()
    assert (batch_of(source, replace(config, seed=1)).images != first).any()


def test_every_epoch_has_each_image_once_in_a_new_order() -> None:
    source = open_source("digits", "validation")
    config = replace(CONFIG, batch_size=20)
    epochs = [
        np.concatenate([batch_of(source, config, i).images for i in range(s, s + 9)])
        for s in (0, 9)
    ]
    expected = np.unique(source.images, axis=0)
    for epoch in epochs:
        np.testing.assert_array_equal(np.unique(epoch, axis=0), expected)
    assert (epochs[0] != epochs[1]).any()


@pytest.mark.process
@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="glibc's setting")
def test_batches_are_read_into_memory_that_the_process_already_has() -> None:
    """A batch has 1,176 pages; without the setting, reading one takes 560 page faults.

    With it, five runs on a busy machine took 0, 0, 0, 65 and 129.
    """
    result = subprocess.run([sys.executable, "-c", FAULTS], capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    assert int(result.stdout) < 280


@pytest.mark.parametrize("batch_size", [1, 64, 360, 500])
def test_an_evaluation_reads_every_image_once_at_any_batch_size(batch_size: int) -> None:
    source = open_source("digits", "test")
    batches = list(evaluation_batches(source, SMALL, Reading(batch_size)))
    assert {len(batch.images) for batch in batches} == {batch_size}
    valid = np.concatenate([batch.valid for batch in batches])
    images = np.concatenate([batch.images for batch in batches])[valid]
    labels = np.concatenate([batch.labels for batch in batches])[valid]
    order = evaluation_order(360)
    np.testing.assert_array_equal(np.sort(order), np.arange(360))
    np.testing.assert_array_equal(images, source.images[order])
    np.testing.assert_array_equal(labels[:, 0], source.labels[order])
    assert images.dtype == np.uint8 and labels.dtype == np.int32


def test_the_order_of_evaluations_is_that_of_two_shuffles_of_grain_and_never_changes() -> None:
    """It decides which images share a group, and with it every recorded result."""
    assert evaluation_order(12).tolist() == [7, 9, 1, 0, 8, 5, 2, 10, 6, 11, 4, 3]
    for count in (0, 1, 360, 70_000):
        shuffled = grain.MapDataset.range(count).shuffle(seed=0).shuffle(seed=1)
        step = 1 + count // 100
        expected = [shuffled[i] for i in range(0, count, step)]
        assert evaluation_order(count)[::step].tolist() == expected


@pytest.mark.parametrize(
    ("count", "classes", "tolerance"), [(512, 10, 0.2), (10_000, 10, 0.05), (50_000, 1_000, 0.2)]
)
def test_classes_that_are_stored_one_after_the_other_meet_in_groups_as_by_chance(
    count: int, classes: int, tolerance: float
) -> None:
    """One in ``classes`` pairs of images that share a group of eight is of one class."""
    stored = np.arange(count) * classes // count
    groups = stored[evaluation_order(count)][: count // 8 * 8].reshape(-1, 8)
    pairs = [groups[:, i] == groups[:, j] for i in range(8) for j in range(i)]
    expected = (count / classes - 1) / (count - 1)
    assert np.mean(pairs) == pytest.approx(expected, rel=tolerance)


def test_too_many_classes_and_batches_that_cannot_be_formed_are_refused() -> None:
    source = open_source("digits", "train")
    for change, message in [
        (
            dict(model=dict(num_classes=9)),
            "model.num_classes=9: digits:train has 10 classes: raise it",
        ),
        (dict(batch_size=2000), "batch_size=2000: more than the 1257"),
    ]:
        with pytest.raises(UsageError, match=message):
            training_batches(source, replace(CONFIG, **change))


def test_a_batch_of_more_bytes_than_64_bits_count_is_out_of_memory() -> None:
    with pytest.raises(MemoryError):
        empty_batch(2, 1, Preprocessing(2**31 - 1))


def test_training_and_evaluation_resize_images_in_the_same_way() -> None:
    source = open_source("digits", "validation")
    config = replace(CONFIG, batch_size=20, model=dict(image_size=16))
    expected = np.stack([resize_and_crop(image, Preprocessing(16)) for image in source.images])
    images = next(evaluation_batches(source, Preprocessing(16), Reading(180))).images
    np.testing.assert_array_equal(images, expected[evaluation_order(180)])
    seen = np.concatenate([batch_of(source, config, i).images for i in range(9)])
    np.testing.assert_array_equal(np.unique(seen, axis=0), np.unique(images, axis=0))
    kept = replace(config, data=dict(preprocessing=dict(keep_aspect=True)))  # of squares: the same
    np.testing.assert_array_equal(batch_of(source, kept).images, batch_of(source, config).images)


def test_the_batches_of_several_processes_concatenate_to_those_of_one() -> None:
    source = open_source("digits", "train")
    config = replace(CONFIG, batch_size=24, data=replace(CONFIG.data, rotate=5.0))
    for count in (2, 4):
        shards = [training_batches(source, config, shard=(i, count)) for i in range(count)]
        for i in (0, 3, 60):  # 60 is in the second epoch
            joined = (np.concatenate(x) for x in zip(*(s[i].batch for s in shards), strict=True))
            for ours, oracle in zip(joined, batch_of(source, config, i), strict=True):
                np.testing.assert_array_equal(ours, oracle)


def test_evaluating_processes_have_equal_batch_counts_and_read_every_image_once() -> None:
    source = open_source("digits", "validation")
    one_process = list(evaluation_batches(source, SMALL, Reading(48)))
    shards = [list(evaluation_batches(source, SMALL, Reading(48), shard=(i, 4))) for i in range(4)]
    assert {len(shard) for shard in shards} == {len(one_process)} == {4}
    for oracle, *parts in zip(one_process, *shards, strict=True):
        for ours, values in zip(zip(*parts, strict=True), oracle, strict=True):
            np.testing.assert_array_equal(np.concatenate(ours), values)
    assert sum(batch.valid.sum() for shard in shards for batch in shard) == len(source) == 180


def png(pixels: np.ndarray, **options: Any) -> bytes:
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, "png", **options)
    return file.getvalue()


class Squares(list):
    """A custom source: PNG files in memory, of many sizes, each of a single color."""

    name, class_names, skipped, max_labels = "squares", ("dark", "light"), Skipped(), 1

    def __init__(self) -> None:
        for i in range(20):
            pixels = np.full((30 - i, 8 + i, 3), 10 * i, np.uint8)
            self.append(Example(png(pixels), (i // 10,), f"squares[{i}]"))

    def labels_of(self, index: int) -> tuple[int, ...]:
        return self[index].labels

    def fingerprint(self) -> Fingerprint:
        return Fingerprint("squares", "", "")


def test_any_object_with_the_methods_of_a_source_gives_batches() -> None:
    source = Squares()
    assert isinstance(source, Source) and not isinstance([], Source)
    train = batch_of(source, replace(CONFIG, batch_size=20))
    test = next(evaluation_batches(source, SMALL, Reading(20)))
    for batch in (train, test):
        order = batch.images[:, 0, 0, 0].argsort()
        expected = np.broadcast_to(10 * np.arange(20)[:, None, None, None], (20, 8, 8, 3))
        np.testing.assert_array_equal(batch.images[order], expected)
        assert batch.labels[order].tolist() == [[0]] * 10 + [[1]] * 10


def test_more_images_than_can_be_shuffled_are_refused() -> None:
    config = replace(CONFIG, model=dataclasses.replace(CONFIG.model, num_classes=1000))
    training_batches(open_source(f"synthetic:{2**32 - 1}", "train"), config)
    with pytest.raises(UsageError, match="has 4,294,967,296 images: at most 4,294,967,295 can be"):
        training_batches(open_source(f"synthetic:{2**32}", "train"), config)
    evaluated = (
        next(evaluation_batches(open_source(name, "train"), SMALL, Reading(2)))
        for name in (f"synthetic:{2**32 - 1}", f"synthetic:{2**32}")
    )
    assert next(evaluated).valid.all()
    with pytest.raises(UsageError, match="has 4,294,967,296 images: at most 4,294,967,295 can be"):
        next(evaluated)


def test_images_have_as_many_columns_of_labels_as_any_has_labels() -> None:
    source = Squares()
    source.max_labels = 3
    source[4] = dataclasses.replace(source[4], labels=(1, 0))
    source[5] = dataclasses.replace(source[5], labels=())
    config = replace(CONFIG, batch_size=20)
    test = next(evaluation_batches(source, SMALL, Reading(22)))
    for batch in (test, batch_of(source, config)):
        rows = {image[0, 0, 0] // 10: row.tolist() for image, row, _ in zip(*batch, strict=True)}
        assert rows[4] == [1, 0, -1] and rows[5] == [-1, -1, -1] and rows[6] == [0, -1, -1]
    assert (test.labels[20:] == -1).all() and not test.valid[20:].any()


def test_shifts_are_in_pixels_of_the_resized_image() -> None:
    """Images of 16 x 16 pixels are resized to 8 x 8, then shifted."""
    large = np.random.default_rng(0).integers(1, 255, (16, 16, 3), dtype=np.uint8)
    source = Squares()
    source[:] = [Example(large, (0,), "large")] * 64
    batch = batch_of(source, replace(CONFIG, batch_size=64, data=DataConfig(shift=1)))
    padded = np.pad(resize_and_crop(large, SMALL), ((1, 1), (1, 1), (0, 0)))
    expected = {padded[y : y + 8, x : x + 8].tobytes() for y in range(3) for x in range(3)}
    assert {image.tobytes() for image in batch.images} == expected


@pytest.mark.parametrize("keep_aspect", [False, True])
def test_a_photo_keeps_its_aspect_in_training_and_evaluation_if_the_config_asks_for_it(
    keep_aspect: bool,
) -> None:
    photo = np.random.default_rng(0).integers(0, 255, (16, 48, 3), dtype=np.uint8)
    photo[:, 16:32] //= 8  # only the middle is dark
    source = Squares()
    source[:] = [Example(png(photo), (0,), "photo")] * 40
    how = PreprocessingConfig("tf_bilinear", keep_aspect=keep_aspect)
    config = replace(CONFIG, data=DataConfig(preprocessing=how), batch_size=40)
    images = batch_of(source, config).images
    (evaluated,) = evaluation_batches(source, config.preprocessing, Reading(40))
    np.testing.assert_array_equal(images, evaluated.images)
    fast = batch_of(source, replace(config, data=dict(decoder="fast"))).images
    for batch in (images, fast):
        assert keep_aspect == (batch.max() < 32)


@pytest.mark.parametrize("decoder", ["exact", "fast"])
def test_training_images_are_random_crops_if_the_config_asks_for_them(decoder: str) -> None:
    """The image is a ramp from left to right, so its columns tell which part is shown."""
    ramp = np.broadcast_to(np.arange(0, 256, 4, dtype=np.uint8)[None, :, None], (64, 64, 3))
    source = Squares()
    source[:] = [Example(png(ramp), (0,), "ramp")] * 40
    data = DataConfig(
        decoder=decoder,
        preprocessing=PreprocessingConfig(interpolation="tf_bilinear"),
        crop_min_area=0.1,
    )
    crops = batch_of(source, replace(CONFIG, batch_size=40, data=data)).images
    widths = (crops[:, 0, -1, 0].astype(int) - crops[:, 0, 0, 0]) / 4 * 8 / 7
    assert widths.min() < 30 and widths.max() > 40 and (widths <= 64).all()
    whole = batch_of(
        source, replace(CONFIG, batch_size=40, data=replace(data, crop_min_area=None))
    ).images
    assert len(np.unique(whole, axis=0)) == 1


def test_what_the_fast_decoder_refuses_is_decoded_exactly_and_counted() -> None:
    source = Squares()
    cmyk = io.BytesIO()
    Image.new("CMYK", (20, 20), (0, 0, 0, 60)).save(cmyk, "jpeg")
    source[3] = Example(cmyk.getvalue(), (0,), "cmyk")
    fast = DataConfig(
        decoder="fast", preprocessing=PreprocessingConfig(interpolation="tf_bilinear")
    )
    read = training_batches(source, replace(CONFIG, batch_size=20, data=fast))[0]
    assert read.refused == ("cmyk",) and not read.unreadable
    assert (read.batch.images[:, 0, 0, 0] == 195).sum() == 1
    refused, lines = Refused(), []
    for _ in range(5):
        refused.add(read.refused)
        lines += refused.news()
    assert [line.split("(")[1] for line in lines] == [
        f"{n} so far)" for n in ("1 time", "2 times", "4 times")
    ]
    assert lines[0].startswith("cmyk: not supported by the fast decoder; decoded exactly")


def test_the_exif_orientation_is_applied_unless_the_config_ignores_it() -> None:
    wide = np.zeros((8, 16, 3), np.uint8)
    wide[:, 8:] = 255
    exif = Image.Exif()
    exif[ExifTags.Base.Orientation] = 6  # the first row is shown on the right
    source = Squares()
    source[:] = [Example(png(wide, exif=exif), (0,), "turned")] * 20
    for apply in (True, False):
        data = DataConfig(preprocessing=PreprocessingConfig(exif=apply))
        config = replace(CONFIG, batch_size=20, data=data)
        for images in (
            batch_of(source, config).images,
            next(evaluation_batches(source, data.preprocessing.of_size(8), Reading(20))).images,
        ):
            top_right, bottom_left = images[0, 0, -1, 0], images[0, -1, 0, 0]
            assert (top_right, bottom_left) == ((0, 255) if apply else (255, 0))


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
        list(evaluation_batches(test, SMALL, Reading(8)))


def test_max_pixels_bounds_the_images_of_every_reader(tmp_path: Path) -> None:
    (tmp_path / "a").mkdir()
    for i in range(20):
        Image.new("RGB", (8, 9)).save(tmp_path / "a" / f"{i}.png")
    name, large = f"folder:{tmp_path}", "8 x 9 pixels are more than data.max_pixels=71; make it"
    assert len(open_source(name, "train", ImageChecks("decode", max_pixels=72)))
    for check in ("headers", "decode"):
        with pytest.raises(
            UsageError, match=f"20 of 20 .*/a/0.png .{large} smaller, or raise that"
        ):
            open_source(name, "train", ImageChecks(check, max_pixels=71))
    source = open_source(name, "train")
    for decoder in ("exact", "fast"):
        preprocessing = PreprocessingConfig(interpolation="tf_bilinear")
        data = DataConfig(max_pixels=71, decoder=decoder, preprocessing=preprocessing)
        config = replace(CONFIG, batch_size=2, data=data)
        with pytest.raises(UsageError, match=f".png: {large}"):
            batch_of(source, config)
    with pytest.raises(UsageError, match=f".png: {large}"):
        list(evaluation_batches(source, config.preprocessing, Reading(2)))


@pytest.fixture(params=["folder", "tar"])
def six(request: pytest.FixtureRequest, tmp_path: Path) -> Callable[[], Source]:
    """Opens six images, as files or in a shard."""
    for i in range(6):
        (tmp_path / "test" / "cat").mkdir(parents=True, exist_ok=True)
        (tmp_path / "test" / "cat" / f"{i}.png").write_bytes(png(np.full((8, 8, 3), i, np.uint8)))
        (tmp_path / "test" / "cat" / f"{i}.cls").write_text("cat")
    with tarfile.open(tmp_path / "test.tar", "w") as archive:
        for path in sorted((tmp_path / "test" / "cat").iterdir()):
            archive.add(path, path.name)
    return lambda: open_source(f"{request.param}:{tmp_path}", "test")


def test_a_read_that_fails_for_a_moment_is_tried_again(six: Callable[[], Source]) -> None:
    source = six()
    with no_more_files(until_retry=True):
        images = [source[i].image for i in range(6)]
    assert [decode(image, "")[0, 0, 0] for image in images] == list(range(6))


def test_images_that_cannot_be_read_now_are_neither_replaced_nor_left_out(
    six: Callable[[], Source], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(retry, "PAUSES", (0, 0, 0))
    list(evaluation_batches(six(), SMALL, Reading(6)))  # imports what it needs
    source, left_out = six(), list[str]()
    config = replace(CONFIG, batch_size=6, data=DataConfig(on_error="replace"))
    training = training_batches(source, config)
    evaluation = evaluation_batches(source, SMALL, Reading(6, on_unreadable=left_out.append))
    files, _, _ = image_files_below(tmp_path)
    message = r"cannot be read now \(Too many open files\); run the same command again"
    for read in (
        lambda: training[0],
        lambda: next(evaluation),
        lambda: unreadable("", files.__getitem__, len(files), tmp_path / "record"),
        six,
    ):
        with no_more_files(), pytest.raises(Failure, match=message):
            read()
    assert not left_out


def test_an_unreadable_image_is_replaced_by_another_that_seed_and_position_determine() -> None:
    source = Squares()
    source[7] = dataclasses.replace(source[7], image=source[7].image[:50])
    config = replace(CONFIG, batch_size=20, data=DataConfig(on_error="replace"))
    first, again = (training_batches(source, config)[0] for _ in range(2))
    for ours, theirs in zip(first.batch, again.batch, strict=True):
        np.testing.assert_array_equal(ours, theirs)
    values = (first.batch.images[:, 0, 0, 0] // 10).tolist()
    assert 7 not in values and len(set(values)) == 19 and len(values) == 20
    replaced = Unreadable("replaced by another image")
    for reason in first.unreadable + again.unreadable:
        replaced.add(reason)
    (line,) = replaced.news()
    assert line.startswith("squares[7]: cannot be read as an image")
    assert line.endswith("; replaced by another image (1 so far)") and not replaced.news()
    same = (first.batch.images == batch_of(Squares(), config).images).all(axis=(1, 2, 3))
    assert same.sum() == 19, "other images changed"


def test_many_unreadable_images_are_a_line_whenever_they_have_doubled_and_a_file(
    tmp_path: Path,
) -> None:
    file, lines = tmp_path / "unreadable.txt", []
    for part in range(2):  # of a run that is resumed, which reads some images again
        if part:  # a power failure may lose the end of a line
            file.write_text(file.read_text() + "10.png: bro")
        replaced = Unreadable("replaced", file)
        for i in range(5 * part, 10 + 10 * part):
            replaced.add(f"{i}.png: broken\nin two")
            lines += replaced.news()
    counts = [line.partition(" (")[2] for line in lines]
    assert counts[0] == "1 so far)"
    assert counts[1:] == [f"{n} so far; {file} lists them)" for n in (2, 4, 8, 20)]
    assert file.read_text().splitlines() == [f"{i}.png: broken\\nin two" for i in range(20)]
    shown = Unreadable("left out")
    for i in range(1000):
        shown.add(f"{i}.png: broken")
    assert shown.news()[19:] == [
        "19.png: broken; left out (20 so far)",
        "980 more images cannot be read; left out",
    ]


def test_an_unreadable_image_becomes_padding_in_an_evaluation() -> None:
    source = Squares()
    source[7] = dataclasses.replace(source[7], image=source[7].image[:50])
    left_out = Unreadable("left out")
    batches = list(evaluation_batches(source, SMALL, Reading(8, on_unreadable=left_out.add)))
    whole = list(evaluation_batches(Squares(), SMALL, Reading(8)))
    valid = np.concatenate([batch.valid for batch in batches])
    seventh = int(np.argsort(evaluation_order(20))[7])
    assert np.flatnonzero(~valid).tolist() == [seventh, 20, 21, 22, 23]
    for ours, theirs in zip(batches, whole, strict=True):
        for x, y in zip(ours, theirs, strict=True):
            np.testing.assert_array_equal(x[ours.valid], y[ours.valid])
        assert not ours.images[~ours.valid].any() and (ours.labels[~ours.valid] == -1).all()
    (line,) = left_out.news()
    assert line.startswith("squares[7]: cannot be read") and line.endswith("; left out (1 so far)")
