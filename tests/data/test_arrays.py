"""NumPy files as data sets: their arrays, their splits, and errors."""

import os
import zipfile
from pathlib import Path

import numpy as np
import pytest

from vmoe.data.sources import SPLITS, open_source
from vmoe.errors import UsageError


@pytest.mark.parametrize("shape", [(40, 8, 8), (40, 8, 8, 1), (40, 8, 8, 3)])
def test_a_numpy_file_is_split_by_class_or_by_the_names_of_its_arrays(
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


@pytest.mark.parametrize(
    ("arrays", "message"),
    [
        (dict(labels=LABELS), "no array 'images'; the file holds labels"),
        (dict(images=IMAGES), "no array 'labels'; the file holds images"),
        (dict(images=IMAGES / 255, labels=LABELS), "images is float64 .* uint8"),
        (dict(images=IMAGES[..., :2], labels=LABELS), r"images is uint8 \(30, 8, 8, 2\)"),
        (dict(images=IMAGES, labels=LABELS[:3]), "an integer for each of the 30 images"),
        (dict(images=IMAGES, labels=LABELS - 1), "labels: give at least one, none below 0"),
        (
            dict(images=IMAGES, labels=LABELS + 2, class_names=["a"]),
            "label 2 has no name; class_names holds 1",
        ),
        (dict(images=IMAGES, labels=np.array([None] * 30)), "not a complete .npz of plain arrays"),
        (dict(images=IMAGES, labels=np.full((30, 2), -2)), "none below -1"),
        (dict(images=IMAGES, labels=np.zeros((30, 2, 2), int)), "labels is int64"),
        (dict(test_images=IMAGES, test_labels=LABELS), "no split 'train': choose from test"),
        (dict(images=IMAGES[:, :0], labels=LABELS), r"images is uint8 \(30, 0, 8, 3\)"),
        (
            dict(images=IMAGES, labels=LABELS, class_names="abc"),
            "class_names is not a list of distinct names",
        ),
        (dict(images=IMAGES, labels=LABELS, class_names=["a", "a"]), "list of distinct names"),
        (dict(images=IMAGES, labels=LABELS + 10**9), "number the classes from 0"),
        (
            dict(
                train_images=IMAGES, train_labels=LABELS, test_images=IMAGES, test_labels=["a"] * 30
            ),
            "test_labels is <U1",
        ),
    ],
)
def test_numpy_files_with_wrong_arrays_are_refused_by_name(
    arrays: dict[str, np.ndarray], message: str, tmp_path: Path
) -> None:
    np.savez(tmp_path / "data.npz", **arrays)
    with pytest.raises(UsageError, match=rf"data\.npz.*{message}"):
        open_source(f"arrays:{tmp_path / 'data.npz'}", "train")


def test_arrays_with_other_names_are_ignored(tmp_path: Path) -> None:
    path = tmp_path / "data.npz"
    np.savez(path, images=IMAGES, labels=LABELS, coarse_labels=LABELS + 19, names=["a"])
    assert open_source(f"arrays:{path}", "train").class_names == ("0",)


def test_arrays_with_other_names_are_not_read(tmp_path: Path) -> None:
    """The checksum of one is wrong, which reading it would find."""
    path = tmp_path / "data.npz"
    np.savez_compressed(path, images=IMAGES, labels=LABELS, note=np.arange(1000))
    content = path.read_bytes()
    with zipfile.ZipFile(path) as archive:
        member = archive.getinfo("note.npy")
    local, central = member.header_offset + 14, content.rindex(b"PK\1\2") + 16
    assert content[local : local + 4] == content[central : central + 4]
    wrong = bytearray(content)
    wrong[local : local + 4] = wrong[central : central + 4] = bytes(4)
    path.write_bytes(wrong)
    with pytest.raises(zipfile.BadZipFile), np.load(path) as arrays:
        _ = arrays["note"]
    assert len(open_source(f"arrays:{path}", "train")) == 24


@pytest.mark.filterwarnings("ignore:Duplicate name")
def test_two_arrays_of_one_name_are_refused(tmp_path: Path) -> None:
    np.savez(tmp_path / "data.npz", images=IMAGES, labels=LABELS)
    with (
        zipfile.ZipFile(tmp_path / "data.npz", "a") as archive,
        archive.open("labels.npy", "w") as file,
    ):
        np.save(file, LABELS + 1)
    with pytest.raises(UsageError, match="two arrays are called 'labels'"):
        open_source(f"arrays:{tmp_path / 'data.npz'}", "train")


def test_two_arrays_at_the_same_byte_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "data.npz"
    np.savez(path, images=IMAGES, labels=LABELS)
    content = bytearray(path.read_bytes())
    second = content.rindex(b"PK\1\2")
    content[second + 42 : second + 46] = bytes(4)  # where its local header starts
    path.write_bytes(content)
    with pytest.raises(UsageError, match="two arrays start at the same byte; save it again"):
        open_source(f"arrays:{path}", "train")


def test_class_names_may_be_bytes(tmp_path: Path) -> None:
    path = tmp_path / "data.npz"
    for stored in ("naïve", "naïve".encode()):
        np.savez(path, images=IMAGES, labels=LABELS, class_names=[stored])
        assert open_source(f"arrays:{path}", "train").class_names == ("naïve",)
    np.savez(path, images=IMAGES, labels=LABELS, class_names=[b"a", b"\xff"])
    with pytest.raises(UsageError, match="class_names: is not text in UTF-8"):
        open_source(f"arrays:{path}", "train")


@pytest.mark.parametrize("name", ["data.npz", "images.npy"])
def test_a_pipe_with_the_name_of_an_array_is_never_opened(name: str, tmp_path: Path) -> None:
    os.mkfifo(tmp_path / name)
    place = tmp_path / name if name == "data.npz" else tmp_path
    with pytest.raises(UsageError, match="not a regular file"):
        open_source(f"arrays:{place}", "train")


def test_files_that_are_not_a_complete_npz_are_refused(tmp_path: Path) -> None:
    np.savez(tmp_path / "whole.npz", images=IMAGES, labels=LABELS)
    (tmp_path / "half.npz").write_bytes((tmp_path / "whole.npz").read_bytes()[:1000])
    np.save(tmp_path / "one.npy", IMAGES)
    for name, message in [
        ("half.npz", "not a complete .npz"),
        ("gone.npz", "no such file"),
        ("one.npy", "one array"),
    ]:
        with pytest.raises(UsageError, match=message):
            open_source(f"arrays:{tmp_path / name}", "train")


@pytest.mark.parametrize(
    ("old", "new"),
    [
        (b"(30, 8, 8, 3)", b"(30, 8, 8, 3("),  # tokenize.TokenError
        (b"(30, 8, 8, 3)", b"(-4, 8, 8, 3)"),  # OverflowError
        (b"(30, 8, 8, 3)", b"(29, 8, 8, 3)"),
        (b"'descr'", b"'desks'"),
        (b"NUMPY", b"NUMPI"),
        (b"PK\x01\x02", b"PK\x01\x03"),
        (b"\x07" * 8, b"\x07" * 7 + b"\x06"),  # a byte of a label, so its checksum differs
    ],
)
def test_a_damaged_file_is_refused_in_one_line(old: bytes, new: bytes, tmp_path: Path) -> None:
    path = tmp_path / "data.npz"
    np.savez(path, images=IMAGES, labels=np.full(30, 0x0707070707070707 * (len(new) == 8)))
    path.write_bytes(path.read_bytes().replace(old, new, 1))
    with pytest.raises(UsageError, match=r"data.npz: not a complete .npz of plain arrays \(.*\)$"):
        open_source(f"arrays:{path}", "train")


def test_a_damaged_header_in_a_folder_is_refused_in_one_line(tmp_path: Path) -> None:
    np.save(tmp_path / "labels.npy", LABELS)
    for shape in (b"(-4, 8, 8, 3)", b"(30, 8, 8, 3("):
        np.save(tmp_path / "images.npy", IMAGES)
        content = (tmp_path / "images.npy").read_bytes()
        (tmp_path / "images.npy").write_bytes(content.replace(b"(30, 8, 8, 3)", shape))
        with pytest.raises(UsageError, match=r"not a complete .npz of plain arrays \(.*\)$"):
            open_source(f"arrays:{tmp_path}", "train")


def test_arrays_of_splits_may_have_other_names(tmp_path: Path) -> None:
    arrays = dict(train_images=IMAGES, train_labels=LABELS, Val_images=IMAGES[:7] + 1)
    arrays |= dict(Val_labels=LABELS[:7])
    np.savez(tmp_path / "data.npz", **arrays)
    splits = [open_source(f"arrays:{tmp_path / 'data.npz'}", split) for split in SPLITS[:2]]
    assert [len(split) for split in splits] == [30, 7] and splits[1][0].image.max() == 1
    np.savez(tmp_path / "data.npz", **arrays, valid_images=IMAGES, valid_labels=LABELS)
    with pytest.raises(UsageError, match="'Val' and 'valid' are both validation"):
        open_source(f"arrays:{tmp_path / 'data.npz'}", "train")


@pytest.mark.parametrize("split", [False, True])
def test_arrays_that_are_not_compressed_are_mapped_and_hold_the_same_images_and_labels(
    split: bool, tmp_path: Path
) -> None:
    rng, prefix = np.random.default_rng(0), "train_" if split else ""
    images = rng.integers(0, 255, (400, 32, 32, 3), dtype=np.uint8)
    arrays = {f"{prefix}images": images, f"{prefix}labels": np.arange(400) % 7}
    np.savez(tmp_path / "mapped.npz", **arrays)
    np.savez_compressed(tmp_path / "read.npz", **arrays)
    (tmp_path / "folder").mkdir()
    for name, array in arrays.items():
        np.save(tmp_path / "folder" / f"{name}.npy", array)
    mapped, folder, read = (
        open_source(f"arrays:{tmp_path / name}", "train")
        for name in ("mapped.npz", "folder", "read.npz")
    )
    for source in (mapped, folder):
        assert isinstance(source.images, np.memmap) and isinstance(source.labels, np.memmap)
    assert not isinstance(read.images, np.memmap)
    assert len(mapped) == len(folder) == len(read) > 300
    assert mapped.fingerprint() == folder.fingerprint() == read.fingerprint()
    for i in range(len(read)):
        expected = read[i]
        assert mapped.labels_of(i) == folder.labels_of(i) == expected.labels
        np.testing.assert_array_equal(mapped[i].image, expected.image)
        np.testing.assert_array_equal(folder[i].image, expected.image)


@pytest.mark.parametrize("dtype", ["uint8", "int8", "uint16", ">i4", "uint64"])
def test_labels_of_any_integer_type_are_the_same_data_set(dtype: str, tmp_path: Path) -> None:
    for name in ("int64", dtype):
        labels = (np.arange(30) % 3).astype(name)
        np.savez(tmp_path / f"{np.dtype(name).name}.npz", images=IMAGES, labels=labels)
    for split in SPLITS:
        expected = open_source(f"arrays:{tmp_path / 'int64.npz'}", split)
        source = open_source(f"arrays:{tmp_path / np.dtype(dtype).name}.npz", split)
        assert source.fingerprint() == expected.fingerprint()
        assert [source.labels_of(i) for i in range(len(source))] == [
            expected.labels_of(i) for i in range(len(expected))
        ]


def test_an_image_has_as_many_labels_as_are_not_padding(tmp_path: Path) -> None:
    labels = np.array([[0, 2, -1], [1, -1, -1], [-1, -1, -1]] * 10)
    np.savez(tmp_path / "data.npz", images=IMAGES, labels=labels)
    splits = [open_source(f"arrays:{tmp_path / 'data.npz'}", s) for s in SPLITS]
    assert [len(split) for split in splits] == [24, 3, 3] and splits[0].max_labels == 2
    assert splits[0].class_names == ("0", "1", "2")
    found = [split.labels_of(i) for split in splits for i in range(len(split))]
    assert sorted(found) == sorted([(0, 2), (1,), ()] * 10)
