"""Data sets: what each source holds, how it is split, and what it refuses."""

import functools
import gzip
import hashlib
import http.server
import threading
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from vmoe.config import TrainConfig, ViTConfig
from vmoe.data.pipeline import training_batches
from vmoe.data.sources import fashion_mnist, name_and_split, open_source, relabel
from vmoe.errors import UsageError


def write_images(folder: Path, count: int, *, value: int = 0) -> None:
    folder.mkdir(parents=True)
    for i in range(count):
        Image.fromarray(np.full((8, 8, 3), value + i, np.uint8)).save(folder / f"{i:03}.png")


@pytest.fixture
def photos(tmp_path: Path) -> Path:
    write_images(tmp_path / "photos" / "cats", 20)
    write_images(tmp_path / "photos" / "dogs", 10, value=100)
    (tmp_path / "photos" / "dogs" / "notes.txt").write_text("not for training")
    (tmp_path / "photos" / ".hidden").mkdir()
    write_images(tmp_path / "photos" / "cats" / ".checkpoints", 20)
    return tmp_path / "photos"


def test_a_folder_is_split_by_share_of_each_class_always_alike(photos: Path) -> None:
    splits = {s: open_source(f"folder:{photos}", s) for s in ("train", "validation", "test")}
    assert {name: len(split) for name, split in splits.items()} == {
        "train": 24,
        "validation": 3,
        "test": 3,
    }
    for name, split in splits.items():
        assert split.class_names == ("cats", "dogs") and split.skipped == 1
        again = open_source(f"folder:{photos}", name)
        assert again.images.paths == split.images.paths
        assert all(split[i].image.max() // 100 == split[i].label for i in range(len(split)))
    values = [int(s[i].image[0, 0, 0]) for s in splits.values() for i in range(len(s))]
    assert sorted(values) == [*range(20), *range(100, 110)]


def test_a_folder_with_parts_of_its_own_keeps_them(photos: Path, tmp_path: Path) -> None:
    root = tmp_path / "parts"
    root.mkdir()
    photos.rename(root / "train")
    write_images(root / "test" / "dogs", 4)
    test = open_source(f"folder:{root}", "test")
    assert list(test.labels) == [1] * 4 and test.class_names == ("cats", "dogs")
    assert len(open_source(f"folder:{root}", "train")) == 27
    assert len(open_source(f"folder:{root}", "validation")) == 3
    write_images(root / "val" / "cats", 5)
    assert len(open_source(f"folder:{root}", "validation")) == 5
    assert len(open_source(f"folder:{root}", "train")) == 30


def test_a_folder_trains_through_the_same_pipeline_at_any_size(photos: Path) -> None:
    source = open_source(f"folder:{photos}", "train")
    model = ViTConfig(patch_size=4, image_size=16, num_classes=2)
    batch = training_batches(source, TrainConfig(model=model, batch_size=24))[0]
    assert batch.images.shape == (24, 16, 16, 3) and batch.labels.sum(0).tolist() == [16, 8]


def test_folders_that_cannot_be_trained_on_are_refused_by_name(photos: Path) -> None:
    (photos / "empty").mkdir()
    with pytest.raises(UsageError, match=r"photos/empty: no images in it"):
        open_source(f"folder:{photos}", "train")
    (photos / "empty").rmdir()
    write_images(photos / "few", 2)
    with pytest.raises(UsageError, match="class 'few' has 2 images, too few"):
        open_source(f"folder:{photos}", "train")
    with pytest.raises(UsageError, match="no sub-folders"):
        open_source(f"folder:{photos / 'few'}", "train")
    with pytest.raises(UsageError, match="nowhere: no such folder"):
        open_source("folder:nowhere", "train")
    with pytest.raises(UsageError, match="'folder' needs a path"):
        open_source("folder", "train")


def test_a_part_that_is_missing_or_has_a_strange_class_is_refused(tmp_path: Path) -> None:
    write_images(tmp_path / "train" / "cats", 3)
    write_images(tmp_path / "validation" / "cows", 3)
    with pytest.raises(UsageError, match="no part 'test', there are train, validation"):
        open_source(f"folder:{tmp_path}", "test")
    with pytest.raises(UsageError, match="class 'cows' has no folder in the training part"):
        open_source(f"folder:{tmp_path}", "validation")


@pytest.mark.parametrize("shape", [(40, 8, 8), (40, 8, 8, 1), (40, 8, 8, 3)])
def test_a_numpy_file_is_split_by_share_or_as_its_arrays_are_named(
    shape: tuple[int, ...], tmp_path: Path
) -> None:
    rng = np.random.default_rng(0)
    images, labels = rng.integers(0, 255, shape, dtype=np.uint8), np.arange(40) % 2
    path = tmp_path / "data.npz"
    np.savez(path, images=images, labels=labels, class_names=["odd", "even"])
    splits = [open_source(f"arrays:{path}", s) for s in ("train", "validation", "test")]
    assert [len(split) for split in splits] == [32, 4, 4]
    assert splits[0].class_names == ("odd", "even")
    assert splits[0][0].image.shape == (8, 8, 3)
    np.savez(path, train_images=images, train_labels=labels, test_images=images[:6],
             test_labels=labels[:6])  # fmt: skip
    splits = [open_source(f"arrays:{path}", s) for s in ("train", "validation", "test")]
    assert [len(split) for split in splits] == [36, 4, 6]
    expected = images[:6] if images.shape[-1] == 3 else images[:6].reshape(6, 8, 8, 1)
    np.testing.assert_array_equal(splits[2].images, np.broadcast_to(expected, (6, 8, 8, 3)))


IMAGES, LABELS = np.zeros((30, 8, 8, 3), np.uint8), np.zeros(30, int)
WORDS = ["a"] * 30


@pytest.mark.parametrize(
    ("arrays", "message"),
    [
        (dict(labels=LABELS), "no array 'images', there are labels"),
        (dict(images=IMAGES), "no array 'labels', there are images"),
        (dict(images=IMAGES / 255, labels=LABELS), "images is float64 .* uint8"),
        (dict(images=IMAGES[..., :2], labels=LABELS), r"images is uint8 \(30, 8, 8, 2\)"),
        (dict(images=IMAGES, labels=LABELS[:3]), "an integer for each of the 30 images"),
        (dict(images=IMAGES, labels=LABELS - 1), "labels count from 0"),
        (dict(images=IMAGES, labels=LABELS + 2, class_names=["a"]), "label 2, and class_names has"),
        (dict(images=IMAGES, labels=np.array([None] * 30)), "not a whole .npz of plain arrays"),
        (dict(test_images=IMAGES, test_labels=LABELS), "no part 'train', there are test"),
        (dict(images=IMAGES[:, :0], labels=LABELS), r"images is uint8 \(30, 0, 8, 3\)"),
        (dict(images=IMAGES, labels=LABELS, class_names="abc"), "class_names is a list of names"),
        (dict(images=IMAGES, labels=LABELS, class_names=["a", "a"]), "names that differ"),
        (dict(images=IMAGES, labels=LABELS + 10**9), "labels count the classes from 0"),
        (
            dict(
                train_images=IMAGES, train_labels=LABELS, test_images=IMAGES, test_labels=["a"] * 30
            ),
            "test_labels is <U1",
        ),
    ],
)
def test_numpy_files_that_do_not_fit_are_refused_by_name(
    arrays: dict[str, np.ndarray], message: str, tmp_path: Path
) -> None:
    np.savez(tmp_path / "data.npz", **arrays)
    with pytest.raises(UsageError, match=rf"data\.npz.*{message}"):
        open_source(f"arrays:{tmp_path / 'data.npz'}", "train")


def test_arrays_of_other_names_are_left_alone(tmp_path: Path) -> None:
    path = tmp_path / "data.npz"
    np.savez(path, images=IMAGES, labels=LABELS, coarse_labels=LABELS + 19, names=["a"])
    assert open_source(f"arrays:{path}", "train").class_names == ("0",)


def test_files_that_are_no_numpy_file_are_refused(tmp_path: Path) -> None:
    np.savez(tmp_path / "whole.npz", images=IMAGES, labels=LABELS)
    (tmp_path / "half.npz").write_bytes((tmp_path / "whole.npz").read_bytes()[:1000])
    np.save(tmp_path / "one.npy", IMAGES)
    for name, message in [
        ("half.npz", "not a whole .npz"),
        ("gone.npz", "no such file"),
        ("one.npy", "one array"),
    ]:
        with pytest.raises(UsageError, match=message):
            open_source(f"arrays:{tmp_path / name}", "train")


@pytest.mark.parametrize(
    ("text", "parts"),
    [
        ("digits", ("digits", "")),
        ("digits:test", ("digits", "test")),
        ("folder:a/b:validation", ("folder:a/b", "validation")),
        ("folder:test", ("folder:test", "")),
        ("fashion_mnist:some/folder", ("fashion_mnist:some/folder", "")),
    ],
)
def test_a_split_is_what_stands_behind_the_last_colon(text: str, parts: tuple[str, str]) -> None:
    assert name_and_split(text) == parts


def test_a_split_in_the_name_of_the_digits_never_becomes_the_data_trained_on() -> None:
    with pytest.raises(UsageError, match="no split 'test'"):
        open_source("digits:test", "train")


def test_a_fingerprint_changes_with_files_labels_and_classes(photos: Path) -> None:
    first = open_source(f"folder:{photos}", "train").fingerprint()
    assert open_source(f"folder:{photos}", "train").fingerprint() == first
    (photos / "cats" / "003.png").unlink()
    assert open_source(f"folder:{photos}", "train").fingerprint() != first
    digits = [open_source("digits", split).fingerprint() for split in ("train", "test", "test")]
    assert digits[0] != digits[1] == digits[2]


def test_labels_follow_the_names_of_the_models_classes() -> None:
    digits = open_source("digits", "test")
    found = relabel(digits, tuple("9876543210"))
    np.testing.assert_array_equal(found.labels, 9 - digits.labels)
    assert relabel(digits, digits.class_names) is digits
    with pytest.raises(UsageError, match="'0': there are cat, dog"):
        relabel(digits, ("cat", "dog"))


@pytest.fixture
def clothes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Four files of the published form, 24 images large, and the table of their checksums."""
    rng, table = np.random.default_rng(0), {}
    folder = tmp_path / "clothes"
    folder.mkdir()
    for name in fashion_mnist.SHA256:
        if "images" in name:
            content = bytes(16) + rng.integers(0, 255, (120, 28, 28), dtype=np.uint8).tobytes()
        else:
            content = bytes(8) + (np.arange(120) % 10).astype(np.uint8).tobytes()
        (folder / f"{name}.gz").write_bytes(gzip.compress(content))
        table[name] = hashlib.sha256(content).hexdigest()
    monkeypatch.setattr(fashion_mnist, "SHA256", table)
    monkeypatch.setattr(fashion_mnist, "DEBIAN", tmp_path / "nothing")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return folder


@pytest.fixture
def server(clothes: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    handler = functools.partial(Quiet, directory=str(clothes))
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as running:
        threading.Thread(target=running.serve_forever, daemon=True).start()
        address = f"http://127.0.0.1:{running.server_port}"
        monkeypatch.setattr(fashion_mnist, "ADDRESS", address)
        yield clothes
        running.shutdown()


class Quiet(http.server.SimpleHTTPRequestHandler):
    def log_message(self, *words: object) -> None:
        pass


def test_fashion_mnist_of_a_folder_has_ten_classes_evenly_split(clothes: Path) -> None:
    splits = [open_source(f"fashion_mnist:{clothes}", s) for s in ("train", "validation", "test")]
    assert [len(split) for split in splits] == [110, 10, 120]
    assert np.bincount(splits[1].labels).tolist() == [1] * 10
    assert splits[0].class_names[9] == "Ankle boot" and splits[0][0].image.shape == (28, 28, 3)


def test_fashion_mnist_is_downloaded_once_and_checked(server: Path, tmp_path: Path) -> None:
    downloaded = open_source("fashion_mnist", "test")
    for path in server.iterdir():
        path.unlink()
    again = open_source("fashion_mnist", "test")
    np.testing.assert_array_equal(again.images, downloaded.images)
    names = {path.name for path in (tmp_path / "cache" / "vmoe" / "fashion_mnist").iterdir()}
    assert names == {f"{name}.gz" for name in fashion_mnist.SHA256}, "something half-done is left"


def test_a_download_that_fails_or_is_another_file_leaves_nothing(server: Path) -> None:
    path = server / "train-images-idx3-ubyte.gz"
    path.write_bytes(gzip.compress(b"something else"))
    with pytest.raises(UsageError, match="damaged, its SHA-256 is another"):
        open_source("fashion_mnist", "train")
    path.unlink()
    with pytest.raises(UsageError, match=r"cannot be downloaded .*File not found.*: get Fashion"):
        open_source("fashion_mnist", "train")
    cache = Path(fashion_mnist.os.environ["XDG_CACHE_HOME"]) / "vmoe" / "fashion_mnist"
    assert not list(cache.iterdir())


def test_damaged_files_of_fashion_mnist_are_refused_by_name(clothes: Path) -> None:
    path = clothes / "t10k-labels-idx1-ubyte.gz"
    path.write_bytes(path.read_bytes()[:-12])
    with pytest.raises(UsageError, match=r"t10k-labels-idx1-ubyte\.gz: damaged"):
        open_source(f"fashion_mnist:{clothes}", "test")
    path.unlink()
    with pytest.raises(UsageError, match=r"t10k-labels-idx1-ubyte\.gz: no such file"):
        open_source(f"fashion_mnist:{clothes}", "test")
