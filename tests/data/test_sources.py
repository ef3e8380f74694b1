"""Data sets by name: the examples of each source, its splits, and errors."""

import collections
import inspect
import io
import multiprocessing
import operator
import os
import pickle
import shutil
import subprocess
import sys
import tarfile
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from scripts.prepare import array_record
from tests.command import ROOT
from vmoe.class_names import class_names
from vmoe.config import DataConfig, TrainConfig, ViTConfig
from vmoe.config.data import ImageChecks
from vmoe.data import check
from vmoe.data.decode import decode
from vmoe.data.pipeline import training_batches
from vmoe.data.sources import (
    KINDS,
    SPLITS,
    Example,
    Fingerprint,
    Source,
    index,
    name_and_split,
    open_source,
    open_splits,
    relabel,
    skipped_messages,
)
from vmoe.data.sources.source import Skipped
from vmoe.errors import UsageError

REPLACE = ImageChecks(on_error="replace")


def write_images(folder: Path, count: int, *, value: int = 0) -> None:
    folder.mkdir(parents=True)
    for i in range(count):
        Image.fromarray(np.full((8, 8, 3), value + i, np.uint8)).save(folder / f"{i:03}.png")


def value(example: Example) -> int:
    """The value of all pixels of an image by ``write_images``."""
    return int(decode(example.image, example.origin)[0, 0, 0])


def labels(source: Source) -> list[int]:
    return [label for i in range(len(source)) for label in source.labels_of(i)]


@pytest.fixture
def photos(tmp_path: Path) -> Path:
    write_images(tmp_path / "photos" / "cats", 20)
    write_images(tmp_path / "photos" / "dogs", 10, value=100)
    (tmp_path / "photos" / "dogs" / "notes.txt").write_text("not for training")
    (tmp_path / "photos" / ".hidden").mkdir()
    write_images(tmp_path / "photos" / "cats" / ".checkpoints", 20)
    return tmp_path / "photos"


def test_a_folder_is_split_within_each_class_and_deterministically(photos: Path) -> None:
    splits = {s: open_source(f"folder:{photos}", s) for s in ("train", "validation", "test")}
    assert {name: len(split) for name, split in splits.items()} == {
        "train": 24,
        "validation": 4,
        "test": 2,
    }
    for name, split in splits.items():
        assert split.class_names == ("cats", "dogs")
        assert split.skipped == Skipped(others=(str(photos / "dogs" / "notes.txt"),))
        assert {example.labels for example in split} == {(0,), (1,)}
        assert list(split) == list(open_source(f"folder:{photos}", name))
        assert all(value(example) // 100 == example.labels[0] for example in split)
    values = [value(example) for split in splits.values() for example in split]
    assert sorted(values) == [*range(20), *range(100, 110)]


def test_adding_or_removing_an_image_moves_no_other_between_splits(tmp_path: Path) -> None:
    write_images(tmp_path / "photos" / "cats", 200)

    def split_of() -> dict[str, str]:
        splits = {s: open_source(f"folder:{tmp_path / 'photos'}", s) for s in SPLITS}
        return {s.path(i): split for split, s in splits.items() for i in range(len(s))}

    before = split_of()
    counts = collections.Counter(before.values())
    assert all(abs(counts[split] - 20) < 15 for split in ("validation", "test")), counts
    for i in range(0, 200, 10):
        (tmp_path / "photos" / "cats" / f"{i:03}.png").unlink()
    write_images(tmp_path / "photos" / "cats" / "new", 10)
    after = split_of()
    assert all(before[file] == split for file, split in after.items() if file in before)
    assert len(after) == 190


def test_a_folder_is_checked_once_however_it_is_spelled_until_a_file_changes(
    photos: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = open_source(f"folder:{photos}", "train")
    (photos / "cats" / "000.png").chmod(0o600)
    with monkeypatch.context() as patch:
        patch.setattr(check, "_reason", None)  # so reading a file would fail
        patch.chdir(photos.parent / "photos" / "cats")
        for spelled in ("..", "../../photos", "../dogs/.."):
            again = open_source(f"folder:{spelled}", "train")
            assert again.fingerprint() == source.fingerprint()
            assert again.skipped.others == (f"{spelled}/dogs/notes.txt",)
    (photos / "cats" / "000.png").write_bytes(b"no image")
    with pytest.raises(UsageError, match="1 of 30 images cannot be read"):
        open_source(f"folder:{photos}", "train")


@pytest.mark.parametrize("form", ["whole", "train/"])
def test_a_folder_is_walked_once_per_run_however_many_of_its_splits_are_opened(
    form: str, photos: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    if form == "train/":
        photos.rename(photos.with_name("train"))
        (photos / "train").parent.mkdir()
        photos.with_name("train").rename(photos / "train")
    walked, scandir = list[str](), os.scandir

    def counting(path: object) -> object:
        walked.append(str(path).rpartition(os.sep)[2])
        return scandir(path)

    monkeypatch.setattr(os, "scandir", counting)
    opened = open_splits(f"folder:{photos}", ["train", "validation"])
    assert walked.count("cats") == walked.count("dogs") == 1
    write_images(photos / form.removeprefix("whole") / "cats" / "new", 100)
    assert len(open_source(f"folder:{photos}", "train")) > len(opened[0])


@pytest.mark.process
@pytest.mark.parametrize(
    ("name", "others"),
    [
        (
            "folder:photos",
            ["tensorflow_datasets", "datasets", "sklearn", "tar", "tfds", "manifest"],
        ),
        ("synthetic:10:8:2", ["tensorflow_datasets", "datasets", "sklearn", "table", "folder"]),
    ],
)
def test_only_the_format_that_is_opened_is_imported(
    name: str, others: list[str], photos: Path
) -> None:
    code = f"""
import sys
from vmoe.data.sources import open_source
open_source({name!r}, "train")
names = [each.rpartition(".")[2] for each in sys.modules if each.startswith("vmoe.data.sources.")]
print(*sorted({{*names, *sys.modules}} & {{*{others}}}))
"""
    command = [sys.executable, "-W", "ignore", "-c", code]
    result = subprocess.run(
        command, capture_output=True, text=True, check=True, cwd=photos.parent,
        env=os.environ | {"PYTHONPATH": str(ROOT)},
    )  # fmt: skip
    assert not result.stdout.strip()


def test_the_help_of_data_name_lists_every_kind_of_data_set() -> None:
    words = inspect.getsource(DataConfig)
    assert [name + kind.path for name, kind in KINDS.items() if name + kind.path not in words] == []


def changed(name: str, change: Callable[[bytes], bytes]) -> Callable[[Path], None]:
    def damage(index: Path) -> None:
        (index / name).write_bytes(change((index / name).read_bytes()))

    return damage


def as_a_file(index: Path) -> None:
    shutil.rmtree(index)
    index.write_text("")


INDEX = "index.json"
DAMAGE = {
    "labels of zeros": changed("labels.bin", lambda old: bytes(len(old))),
    "one bit of a label": changed("labels.bin", lambda old: bytes([old[0] ^ 1]) + old[1:]),
    "one bit of a row": changed("rows_train.bin", lambda old: old[:-1] + b"\x80"),
    "other class names": changed(INDEX, lambda old: old.replace(b"cats", b"cows")),
    "no splits": changed(INDEX, lambda old: old.replace(b'"splits"', b'"split5"')),
    "info that is a number": changed(INDEX, lambda old: b'{"columns": {}, "info": 3}'),
    "no index": lambda index: (index / INDEX).unlink(),
    "no hashes": lambda index: (index / "SHA256SUMS").unlink(),
    "a file in place of its folder": as_a_file,
}


@pytest.mark.parametrize("damage", DAMAGE)
def test_a_damaged_index_is_built_again_and_named(
    damage: str,
    photos: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    before = open_source(f"folder:{photos}", "train")
    expected, fingerprint = list(before), before.fingerprint()
    (index,) = (tmp_path / "cache").glob("vmoe/indexes/*/*")
    assert not capsys.readouterr().err
    DAMAGE[damage](index)
    after = open_source(f"folder:{photos}", "train")
    assert list(after) == expected and after.fingerprint() == fingerprint
    error = capsys.readouterr().err
    assert error == f"folder:{photos}: its index in {index} is damaged: built again\n"


@pytest.mark.parametrize("row", ["1", "99999", "x", "-1"])
def test_a_changed_record_of_unreadable_images_is_not_used(
    row: str, photos: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    (photos / "cats" / "000.png").write_bytes(b"no image")
    before = open_source(f"folder:{photos}", "train", REPLACE)
    (record,) = (tmp_path / "cache").glob("vmoe/indexes/*/*/unreadable.json")
    record.write_text(record.read_text().replace('{"0":', f'{{"{row}":'))
    after = open_source(f"folder:{photos}", "train", REPLACE)
    assert after.skipped == before.skipped


def test_an_index_is_verified_once_by_the_process_that_opens_it_and_not_by_its_workers(
    photos: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = open_source(f"folder:{photos}", "train")
    index._intact.cache_clear()
    open_source(f"folder:{photos}", "validation")
    monkeypatch.setattr(index, "_sums", None)  # so hashing a file would fail
    open_source(f"folder:{photos}", "test")
    assert list(pickle.loads(pickle.dumps(source))) == list(source)


def test_of_many_files_that_are_no_images_a_few_are_named_and_all_are_counted(
    photos: Path,
) -> None:
    for i in range(200):
        (photos / "cats" / f"{i:03}.json").write_text("{}")
    sources = [open_source(f"folder:{photos}", split) for split in SPLITS]
    assert sum(map(len, sources[0].skipped[:2])) <= 5
    named = ", ".join(str(photos / "cats" / f"{i:03}.json") for i in range(5))
    expected = f"skipped 201 files that are not images: {named}, and 196 more"
    assert list(skipped_messages(sources)) == [expected]
    many = Skipped(others=tuple("abcdef"))  # all of them are named
    assert "skipped 207 files" in next(skipped_messages([*sources, many]))


@pytest.mark.parametrize("count", [3, 4, 7])
def test_every_split_has_an_image_of_every_class(count: int, tmp_path: Path) -> None:
    for name in "abcdefgh":
        write_images(tmp_path / name, count)
    sizes = []
    for split in SPLITS:
        source = open_source(f"folder:{tmp_path}", split)
        assert set(labels(source)) == set(range(8))
        sizes.append(len(source))
    assert sum(sizes) == 8 * count


def test_a_folder_that_has_splits_keeps_them(photos: Path, tmp_path: Path) -> None:
    root = tmp_path / "splits"
    root.mkdir()
    photos.rename(root / "train")
    write_images(root / "test" / "dogs", 4)
    test = open_source(f"folder:{root}", "test")
    assert [example.labels for example in test] == [(1,)] * 4
    assert test.class_names == ("cats", "dogs")
    sizes = [len(open_source(f"folder:{root}", split)) for split in ("train", "validation")]
    assert sum(sizes) == 30 and 2 <= sizes[1] <= 6
    write_images(root / "val" / "cats", 5)
    assert len(open_source(f"folder:{root}", "validation")) == 5
    assert len(open_source(f"folder:{root}", "train")) == 30


@pytest.mark.parametrize(
    "names", [("train", "valid", "test"), ("Train", "Val", "Test"), ("training", "dev", "testing")]
)
def test_the_folders_of_splits_may_have_other_names(
    names: tuple[str, str, str], tmp_path: Path
) -> None:
    for i, name in enumerate(names):
        write_images(tmp_path / name / "cats", 4 + i)
        write_images(tmp_path / name / "dogs", 4 + i)
    write_images(tmp_path / "spare" / "cats", 1)
    strays = [tmp_path / "stray.png", tmp_path / names[1] / "stray.png"]
    for path in strays:
        Image.new("RGB", (8, 8)).save(path)
    sources = [open_source(f"folder:{tmp_path}", split) for split in SPLITS]
    assert [len(source) for source in sources] == [8, 10, 12]
    assert {source.class_names for source in sources} == {("cats", "dogs")}
    beside = ", ".join(sorted(map(str, [tmp_path / "spare", *strays])))
    assert list(skipped_messages(sources)) == [
        f"skipped 3 paths next to the folders of the classes or splits: {beside}"
    ]
    (tmp_path / "validation").mkdir()
    message = f"'{names[1]}' and 'validation' are both validation; rename or remove one"
    with pytest.raises(UsageError, match=message):
        open_source(f"folder:{tmp_path}", "train")


def test_a_class_may_be_called_train(tmp_path: Path) -> None:
    for name in ("Bus", "Car", "Train"):
        write_images(tmp_path / name, 5)
    assert open_source(f"folder:{tmp_path}", "train").class_names == ("Bus", "Car", "Train")


def test_links_that_lead_nowhere_are_skipped_with_a_line(photos: Path) -> None:
    (photos / "cats" / "self.png").symlink_to("self.png")
    (photos / "cats" / "gone.png").symlink_to("nowhere.png")
    (photos / "cats" / "folder").symlink_to("folder")
    (photos / "owls").symlink_to("owls")
    source = open_source(f"folder:{photos}", "train")
    assert {Path(path).name for path in source.skipped.others} == {
        "notes.txt", "self.png", "gone.png", "folder",
    }  # fmt: skip


def test_images_of_a_folder_are_resized_to_the_size_of_the_model(photos: Path) -> None:
    source = open_source(f"folder:{photos}", "train")
    model = ViTConfig(patch_size=4, image_size=16, num_classes=2)
    batch = training_batches(source, TrainConfig(model=model, batch_size=24))[0].batch
    assert batch.images.shape == (24, 16, 16, 3)
    assert np.bincount(batch.labels[:, 0]).tolist() == np.bincount(labels(source)).tolist()


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


def test_the_digits_are_split_evenly_and_deterministically() -> None:
    splits = {name: open_source("digits", name) for name in ("train", "validation", "test")}
    assert {name: len(split) for name, split in splits.items()} == {
        "train": 1257,
        "validation": 180,
        "test": 360,
    }
    rows = np.concatenate([s.images.reshape(len(s), -1) for s in splits.values()])
    assert len(np.unique(rows, axis=0)) == 1797, "an image is in two splits"
    for split in splits.values():
        fraction = np.bincount(split.labels) / len(split)
        np.testing.assert_allclose(fraction, 0.1, atol=0.01)
    # Another random split would start with another image.
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
def test_the_split_of_a_name_follows_its_last_colon(text: str, parts: tuple[str, str]) -> None:
    assert name_and_split(text) == parts


def test_a_split_in_the_name_of_the_digits_is_refused() -> None:
    with pytest.raises(
        UsageError, match="digits:test: no split 'test' can be given here; use 'digits'"
    ):
        open_source("digits:test", "train")


def test_an_example_records_its_origin(photos: Path) -> None:
    assert open_source("digits", "train")[3].origin == "digits:train[3]"
    example = open_source(f"folder:{photos}", "train")[0]
    assert Path(example.origin).read_bytes() == example.image
    assert Path(example.origin).parent == photos / "cats"


def test_the_fingerprint_of_a_folder_changes_with_files_labels_and_classes(tmp_path: Path) -> None:
    """So it does with the content of a file; with its time in a field of its own."""
    cats, dogs = tmp_path / "photos" / "test" / "cats", tmp_path / "photos" / "test" / "dogs"
    write_images(cats, 3)
    write_images(dogs, 3)

    def fingerprint(folder: str = "photos") -> Fingerprint:
        return open_source(f"folder:{tmp_path / folder}", "test").fingerprint()

    fingerprints = [fingerprint()]
    os.utime(cats / "000.png", (0, 0))
    assert fingerprint().times != fingerprints[0].times
    assert fingerprint()._replace(times="") == fingerprints[0]._replace(times="")
    write_images(tmp_path / "other", 1, value=3)
    shutil.copy(tmp_path / "other" / "000.png", cats / "000.png")
    fingerprints.append(fingerprint())
    assert fingerprints[0].content != fingerprints[1].content
    (cats / "000.png").rename(cats / "a.png")
    fingerprints.append(fingerprint())
    (cats / "a.png").rename(dogs / "a.png")
    fingerprints.append(fingerprint())
    (dogs / "a.png").unlink()
    fingerprints.append(fingerprint())
    dogs.rename(dogs.with_name("wolves"))
    fingerprints.append(fingerprint())
    assert len(set(fingerprints)) == 6
    (tmp_path / "photos").rename(tmp_path / "moved")
    assert fingerprint("moved") == fingerprints[-1]


def test_the_fingerprint_of_arrays_changes_with_images_labels_and_classes(tmp_path: Path) -> None:
    """Only evenly spaced images of many are read; changes between these are not detected."""
    images = np.random.default_rng(0).integers(0, 255, (640, 4, 4, 3), dtype=np.uint8)
    arrays = dict(test_images=images, test_labels=np.arange(640) % 2, class_names=["a", "b"])

    def fingerprint(**changes: np.ndarray | list[str]) -> Fingerprint:
        np.savez(tmp_path / "data.npz", **(arrays | changes))
        return open_source(f"arrays:{tmp_path / 'data.npz'}", "test").fingerprint()

    def changed(name: str, i: int) -> np.ndarray:
        array = arrays[name].copy()
        array[i] = 1 - array[i]
        return array

    fingerprints = [
        fingerprint(),
        fingerprint(test_images=changed("test_images", 0)),
        fingerprint(test_images=changed("test_images", 630)),
        fingerprint(test_images=images.reshape(640, 2, 8, 3)),
        fingerprint(test_images=images[:639], test_labels=arrays["test_labels"][:639]),
        fingerprint(test_labels=changed("test_labels", 5)),
        fingerprint(class_names=["a", "c"]),
    ]
    assert len(set(fingerprints)) == len(fingerprints)
    assert fingerprint() == fingerprints[0] == fingerprint(test_images=changed("test_images", 5))


def test_splits_and_relabeled_sources_have_different_fingerprints() -> None:
    train, test = (open_source("digits", split) for split in ("train", "test"))
    sources = [train, test, relabel(test, "9876543210"), relabel(test, "0123456789a")]
    assert len({source.fingerprint() for source in sources}) == 4
    assert relabel(test, "9876543210").fingerprint() == sources[2].fingerprint()


def test_folders_named_by_synsets_have_the_classes_of_an_imagenet_model(tmp_path: Path) -> None:
    for i, synset in enumerate(["n02099601", "n01440764"]):
        (tmp_path / "test" / synset).mkdir(parents=True)
        Image.new("RGB", (8, 8), (i, 0, 0)).save(tmp_path / "test" / synset / "0.png")
    source = relabel(open_source(f"folder:{tmp_path}", "test"), class_names("imagenet_1k"))
    assert [source.class_names[each.labels[0]] for each in source] == ["tench", "golden retriever"]
    with pytest.raises(UsageError, match="has a class that the model was not trained on, 'n0144"):
        relabel(open_source(f"folder:{tmp_path}", "test"), ["cat", "dog"])


def test_relabel_maps_labels_to_the_classes_of_a_model() -> None:
    digits = open_source("digits", "test")
    relabeled = relabel(digits, "9876543210")
    assert isinstance(relabeled, Source) and relabeled.class_names == tuple("9876543210")
    assert [example.labels for example in relabeled] == [(9 - label,) for label in digits.labels]
    assert relabeled.name == digits.name
    np.testing.assert_array_equal(relabeled[5].image, digits[5].image)
    assert relabel(digits, digits.class_names) is digits
    with pytest.raises(UsageError, match="not trained on, '0': choose from cat, dog"):
        relabel(digits, ("cat", "dog"))


@pytest.mark.parametrize("kind", ["digits", "relabeled digits", "arrays", "folder"])
def test_a_pickled_source_holds_no_pixels_and_opens_the_same_data(
    kind: str, photos: Path, tmp_path: Path
) -> None:
    images = np.random.default_rng(0).integers(0, 255, (100, 8, 8), dtype=np.uint8)
    np.savez(tmp_path / "data.npz", images=images, labels=np.arange(100) % 2)
    source = {
        "digits": open_source("digits", "train"),
        "relabeled digits": relabel(open_source("digits", "train"), "9876543210"),
        "arrays": open_source(f"arrays:{tmp_path / 'data.npz'}", "train"),
        "folder": open_source(f"folder:{photos}", "train"),
    }[kind]
    pickled = pickle.dumps(source)
    assert len(pickled) < 2500
    unpickled = pickle.loads(pickled)
    assert isinstance(unpickled, Source) and len(unpickled) == len(source)
    assert (unpickled.name, unpickled.class_names) == (source.name, source.class_names)
    assert unpickled.skipped == source.skipped and unpickled.fingerprint() == source.fingerprint()
    for i in range(0, len(source), 1 + len(source) // 100):
        ours, expected = unpickled[i], source[i]
        assert (ours.labels, ours.origin) == (expected.labels, expected.origin)
        assert unpickled.labels_of(i) == expected.labels and source.max_labels == 1
        np.testing.assert_array_equal(*(decode(x.image, "") for x in (ours, expected)))


def forms(folder: Path) -> dict[str, Path | str]:
    """Twelve images of two classes in every form that a set of images can have."""
    import datasets
    from tensorflow_datasets import features

    files = {f"{'cats' if i < 5 else 'dogs'}/{i}.png": i for i in range(12)}
    content = dict[str, bytes]()
    for name, i in files.items():
        path = folder / "photos" / "test" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(np.full((4, 4, 3), 9 * i, np.uint8)).save(path)
        content[name] = path.read_bytes()
    names, classes = list(files), ["cats", "dogs"]
    labels = [classes.index(name.split("/")[0]) for name in names]
    lines = [f"photos/test/{name},{name.split('/')[0]},test" for name in names]
    (folder / "list.csv").write_text("\n".join(["path,label,split", *lines]))
    with tarfile.open(folder / "test.tar", "w") as archive:
        for name, label in zip(names, labels, strict=True):
            archive.add(folder / "photos" / "test" / name, name)
            text = classes[label].encode()
            member = tarfile.TarInfo(name.replace("png", "cls"))
            member.size = len(text)
            archive.addfile(member, io.BytesIO(text))
    split = array_record.Split(
        names,
        np.array([len(each) for each in content.values()]),
        np.arange(12),
        lambda i: content[names[i]],
        lambda i: {"label": labels[i]},
    )
    label = {"label": features.ClassLabel(names=classes)}
    array_record.write(folder / "tfds" / "photos" / "1.0.0", "photos", label, {"test": split})
    columns = {
        "image": [{"bytes": each, "path": None} for each in content.values()],
        "label": labels,
    }
    kinds = {"image": datasets.Image(), "label": datasets.ClassLabel(names=classes)}
    datasets.disable_progress_bars()
    arrow = datasets.Dataset.from_dict(columns, features=datasets.Features(kinds))
    datasets.DatasetDict(test=arrow).save_to_disk(folder / "hf")
    pixels = np.stack([decode(each, "") for each in content.values()])
    np.savez(folder / "data.npz", test_images=pixels, test_labels=labels, class_names=classes)
    return {
        "folder": folder / "photos",
        "manifest": folder / "list.csv",
        "tar": folder / "*.tar",
        "tfds": folder / "tfds" / "photos",
        "hf": folder / "hf",
        "arrays": folder / "data.npz",
    }


def contents(source: Source) -> set[tuple[int, str]]:
    """The value and the class of each image."""
    return {(value(example), source.class_names[example.labels[0]]) for example in source}


@pytest.mark.process
def test_the_same_images_in_every_form_are_the_same_data_in_a_worker_process(
    tmp_path: Path,
) -> None:
    names = [f"{kind}:{path}" for kind, path in forms(tmp_path).items()]
    sources = [open_source(name, "test") for name in names]
    digits = relabel(open_source("digits", "train"), "9876543210")
    expected = {(9 * i, "cats" if i < 5 else "dogs") for i in range(12)}
    with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as pool:
        for source, found in zip(sources, pool.map(contents, sources), strict=True):
            assert isinstance(source, Source) and source.class_names == ("cats", "dogs")
            assert found == contents(source) == expected, source.name
        example = pool.submit(operator.getitem, digits, 5).result()
    assert (example.labels, example.origin) == (digits[5].labels, "digits:train[5]")
    np.testing.assert_array_equal(example.image, digits[5].image)
