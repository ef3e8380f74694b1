"""Data sets by name: what each source holds, how it is split, and what is refused."""

import multiprocessing
import operator
import pickle
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from vmoe.config import TrainConfig, ViTConfig
from vmoe.data.decode import decode
from vmoe.data.pipeline import training_batches
from vmoe.data.sources import Example, Source, name_and_split, open_source, relabel
from vmoe.errors import UsageError


def write_images(folder: Path, count: int, *, value: int = 0) -> None:
    folder.mkdir(parents=True)
    for i in range(count):
        Image.fromarray(np.full((8, 8, 3), value + i, np.uint8)).save(folder / f"{i:03}.png")


def value(example: Example) -> int:
    """The value of all pixels of an image by ``write_images``."""
    return int(decode(example.image, example.origin)[0, 0, 0])


@pytest.fixture
def photos(tmp_path: Path) -> Path:
    write_images(tmp_path / "photos" / "cats", 20)
    write_images(tmp_path / "photos" / "dogs", 10, value=100)
    (tmp_path / "photos" / "dogs" / "notes.txt").write_text("not for training")
    (tmp_path / "photos" / ".hidden").mkdir()
    write_images(tmp_path / "photos" / "cats" / ".checkpoints", 20)
    return tmp_path / "photos"


def test_a_folder_is_split_by_class_always_in_the_same_way(photos: Path) -> None:
    splits = {s: open_source(f"folder:{photos}", s) for s in ("train", "validation", "test")}
    assert {name: len(split) for name, split in splits.items()} == {
        "train": 24,
        "validation": 3,
        "test": 3,
    }
    for name, split in splits.items():
        assert split.class_names == ("cats", "dogs") and split.skipped == 1
        assert list(split) == list(open_source(f"folder:{photos}", name))
        assert all(value(example) // 100 == example.label for example in split)
    values = [value(example) for split in splits.values() for example in split]
    assert sorted(values) == [*range(20), *range(100, 110)]


def test_a_folder_with_splits_of_its_own_keeps_them(photos: Path, tmp_path: Path) -> None:
    root = tmp_path / "splits"
    root.mkdir()
    photos.rename(root / "train")
    write_images(root / "test" / "dogs", 4)
    test = open_source(f"folder:{root}", "test")
    assert [example.label for example in test] == [1] * 4
    assert test.class_names == ("cats", "dogs")
    assert len(open_source(f"folder:{root}", "train")) == 27
    assert len(open_source(f"folder:{root}", "validation")) == 3
    write_images(root / "val" / "cats", 5)
    assert len(open_source(f"folder:{root}", "validation")) == 5
    assert len(open_source(f"folder:{root}", "train")) == 30


def test_a_folder_is_trained_on_at_any_image_size(photos: Path) -> None:
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


def test_a_split_that_is_missing_or_has_an_unknown_class_is_refused(tmp_path: Path) -> None:
    write_images(tmp_path / "train" / "cats", 3)
    write_images(tmp_path / "validation" / "cows", 3)
    with pytest.raises(UsageError, match="no split 'test': choose from train, validation"):
        open_source(f"folder:{tmp_path}", "test")
    with pytest.raises(UsageError, match="class 'cows' has no folder in the training split"):
        open_source(f"folder:{tmp_path}", "validation")


def test_the_digits_are_split_evenly_always_in_the_same_way() -> None:
    splits = {name: open_source("digits", name) for name in ("train", "validation", "test")}
    assert {name: len(split) for name, split in splits.items()} == {
        "train": 1257,
        "validation": 180,
        "test": 360,
    }
    rows = np.concatenate([s.images.reshape(len(s), -1) for s in splits.values()])
    assert len(np.unique(rows, axis=0)) == 1797, "an image is in two splits"
    for split in splits.values():
        share = np.bincount(split.labels) / len(split)
        np.testing.assert_allclose(share, 0.1, atol=0.01)
    # A different random split would have another first image.
    assert splits["test"].images[0].sum() == 13290


@pytest.mark.parametrize(
    ("name", "split", "message"),
    [("digit", "test", "did you mean 'digits'"), ("digits", "tests", "did you mean 'test'")],
)
def test_a_misspelled_data_set_or_split_is_refused_with_a_suggestion(
    name: str, split: str, message: str
) -> None:
    with pytest.raises(UsageError, match=message):
        open_source(name, split)


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
def test_a_split_is_what_follows_the_last_colon(text: str, parts: tuple[str, str]) -> None:
    assert name_and_split(text) == parts


def test_a_split_in_the_name_of_the_digits_is_refused() -> None:
    with pytest.raises(
        UsageError, match="digits:test: no split 'test' can be given here; use 'digits'"
    ):
        open_source("digits:test", "train")


def test_an_example_says_where_it_comes_from(photos: Path) -> None:
    assert open_source("digits", "train")[3].origin == "digits:train[3]"
    example = open_source(f"folder:{photos}", "train")[0]
    assert Path(example.origin).read_bytes() == example.image
    assert Path(example.origin).parent == photos / "cats"


def test_the_fingerprint_of_a_folder_changes_with_files_labels_and_classes(tmp_path: Path) -> None:
    """It does not change with the content of a file, nor with the path of the folder."""
    cats, dogs = tmp_path / "photos" / "test" / "cats", tmp_path / "photos" / "test" / "dogs"
    write_images(cats, 3)
    write_images(dogs, 3)

    def fingerprint(folder: str = "photos") -> str:
        return open_source(f"folder:{tmp_path / folder}", "test").fingerprint()

    found = [fingerprint()]
    (cats / "000.png").write_bytes(b"another image")
    assert fingerprint() == found[0]
    (cats / "000.png").rename(cats / "a.png")
    found.append(fingerprint())
    (cats / "a.png").rename(dogs / "a.png")
    found.append(fingerprint())
    (dogs / "a.png").unlink()
    found.append(fingerprint())
    dogs.rename(dogs.with_name("wolves"))
    found.append(fingerprint())
    assert len(set(found)) == 5
    (tmp_path / "photos").rename(tmp_path / "moved")
    assert fingerprint("moved") == found[-1]


def test_the_fingerprint_of_arrays_changes_with_images_labels_and_classes(tmp_path: Path) -> None:
    """Only evenly spaced images are read of many: a change between them is not detected."""
    images = np.random.default_rng(0).integers(0, 255, (640, 4, 4, 3), dtype=np.uint8)
    arrays = dict(test_images=images, test_labels=np.arange(640) % 2, class_names=["a", "b"])

    def fingerprint(**changes: np.ndarray | list[str]) -> str:
        np.savez(tmp_path / "data.npz", **(arrays | changes))
        return open_source(f"arrays:{tmp_path / 'data.npz'}", "test").fingerprint()

    def changed(name: str, i: int) -> np.ndarray:
        array = arrays[name].copy()
        array[i] = 1 - array[i]
        return array

    found = [
        fingerprint(),
        fingerprint(test_images=changed("test_images", 0)),
        fingerprint(test_images=changed("test_images", 630)),
        fingerprint(test_images=images.reshape(640, 2, 8, 3)),
        fingerprint(test_images=images[:639], test_labels=arrays["test_labels"][:639]),
        fingerprint(test_labels=changed("test_labels", 5)),
        fingerprint(class_names=["a", "c"]),
    ]
    assert len(set(found)) == len(found)
    assert fingerprint() == found[0] == fingerprint(test_images=changed("test_images", 5))


def test_splits_and_relabelled_sources_have_fingerprints_of_their_own() -> None:
    train, test = (open_source("digits", split) for split in ("train", "test"))
    sources = [train, test, relabel(test, "9876543210"), relabel(test, "0123456789a")]
    assert len({source.fingerprint() for source in sources}) == 4
    assert relabel(test, "9876543210").fingerprint() == sources[2].fingerprint()


def test_labels_are_those_of_a_models_classes() -> None:
    digits = open_source("digits", "test")
    found = relabel(digits, "9876543210")
    assert isinstance(found, Source) and found.class_names == tuple("9876543210")
    assert [example.label for example in found] == [9 - example.label for example in digits]
    assert found.name == digits.name
    np.testing.assert_array_equal(found[5].image, digits[5].image)
    assert relabel(digits, digits.class_names) is digits
    with pytest.raises(UsageError, match="not trained on, '0': choose from cat, dog"):
        relabel(digits, ("cat", "dog"))


@pytest.mark.parametrize("kind", ["digits", "relabelled digits", "arrays", "folder"])
def test_a_pickled_source_holds_no_pixels_and_opens_the_same_data(
    kind: str, photos: Path, tmp_path: Path
) -> None:
    images = np.random.default_rng(0).integers(0, 255, (100, 8, 8), dtype=np.uint8)
    np.savez(tmp_path / "data.npz", images=images, labels=np.arange(100) % 2)
    source = {
        "digits": open_source("digits", "train"),
        "relabelled digits": relabel(open_source("digits", "train"), "9876543210"),
        "arrays": open_source(f"arrays:{tmp_path / 'data.npz'}", "train"),
        "folder": open_source(f"folder:{photos}", "train"),
    }[kind]
    pickled = pickle.dumps(source)
    assert len(pickled) < 1500
    found = pickle.loads(pickled)
    assert isinstance(found, Source) and len(found) == len(source)
    assert (found.name, found.class_names) == (source.name, source.class_names)
    assert found.skipped == source.skipped and found.fingerprint() == source.fingerprint()
    for i in range(len(source)):
        assert (found[i].label, found[i].origin) == (source[i].label, source[i].origin)
        np.testing.assert_array_equal(*(decode(x[i].image, "") for x in (found, source)))


def test_a_worker_process_reads_the_same_examples() -> None:
    source = relabel(open_source("digits", "train"), "9876543210")
    with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as pool:
        found = pool.submit(operator.getitem, source, 5).result()
    assert (found.label, found.origin) == (source[5].label, "digits:train[5]")
    np.testing.assert_array_equal(found.image, source[5].image)
