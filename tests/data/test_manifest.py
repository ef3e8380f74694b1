"""Lists of images: CSV and JSON Lines, several labels, splits, and errors."""

import json
import os
import pickle
import shutil
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from vmoe.config.data import ImageChecks
from vmoe.data import check
from vmoe.data.sources import SPLITS, Source, manifest, open_source
from vmoe.errors import UsageError

REPLACE = ImageChecks(on_error="replace")


@pytest.fixture
def photos(tmp_path: Path) -> Path:
    """Forty images; all pixels of the i-th have the value i."""
    (tmp_path / "photos").mkdir()
    for i in range(40):
        Image.fromarray(np.full((4, 4, 3), i, np.uint8)).save(tmp_path / "photos" / f"{i}.png")
    return tmp_path / "photos"


def write_csv(photos: Path, header: str, rows: list[str], name: str = "list.csv") -> str:
    (photos.parent / name).write_text("\n".join([header, *rows]) + "\n")
    return f"manifest:{photos.parent / name}"


def everything(name: str) -> dict[str, dict[str, tuple[str, ...]]]:
    """The class names of each file, by split."""
    sources = {split: open_source(name, split) for split in SPLITS}
    return {split: labeled(source) for split, source in sources.items()}


def labeled(source: Source) -> dict[str, tuple[str, ...]]:
    names = source.class_names
    return {
        Path(source[i].origin).name: tuple(names[label] for label in source.labels_of(i))
        for i in range(len(source))
    }


def test_a_csv_file_with_names_equals_the_same_list_in_json_lines(photos: Path) -> None:
    expected = {f"{i}.png": ("odd" if i % 2 else "even",) for i in range(40)}
    rows = [f"photos/{file},{name}" for file, (name,) in expected.items()]
    name = write_csv(photos, "path,label", rows)
    splits = everything(name)
    assert {file: each for split in splits.values() for file, each in split.items()} == expected
    assert sum(map(len, splits.values())) == 40
    assert all(set(split.values()) == {("odd",), ("even",)} for split in splits.values())
    lines = [
        json.dumps({"path": f"photos/{file}", "label": each[0]}) for file, each in expected.items()
    ]
    (photos.parent / "list.jsonl").write_text("\n".join(lines) + "\n\n")
    assert everything(name.replace(".csv", ".jsonl")) == splits


def test_images_have_several_labels_or_none(photos: Path) -> None:
    rows = [f"photos/{i}.png,{'|'.join('abc'[: i % 4])}" for i in range(40)]
    source = open_source(write_csv(photos, "path,labels", rows), "train")
    assert source.max_labels == 3 and source.class_names == ("a", "b", "c")
    for file, names in labeled(source).items():
        assert names == tuple("abc"[: int(Path(file).stem) % 4])


def test_numbers_are_classes_and_a_file_beside_the_list_names_them(photos: Path) -> None:
    rows = [f"photos/{i}.png,{i % 3},{SPLITS[i % 3]}" for i in range(40)]
    name = write_csv(photos, "path,label,split", rows)
    source = open_source(name, "test")
    assert source.class_names == ("0", "1", "2") and len(source) == 13
    assert {source.labels_of(i) for i in range(13)} == {(2,)}
    (photos.parent / "classes.txt").write_text("cat\ndog\ncow\nowl\n")
    assert open_source(name, "test").class_names == ("cat", "dog", "cow", "owl")
    (photos.parent / "classes.txt").write_text("cat\ndog\n")
    with pytest.raises(UsageError, match="label 2 has no name; classes.txt holds 2"):
        open_source(name, "test")


def test_a_list_without_a_validation_split_gets_one_of_the_training_images(photos: Path) -> None:
    rows = [f"photos/{i}.png,{i % 2},{'test' if i < 10 else 'train'}" for i in range(40)]
    splits = everything(write_csv(photos, "path,label,split", rows))
    assert splits["test"].keys() == {f"{i}.png" for i in range(10)}
    assert len(splits["train"]) + len(splits["validation"]) == 30 and splits["validation"]
    assert not splits["train"].keys() & splits["validation"].keys()
    rows = [f"photos/{i}.png,{i % 2},test" for i in range(10)]
    name = write_csv(photos, "path,label,split", rows)
    assert len(open_source(name, "test")) == 10
    with pytest.raises(UsageError, match="no split 'train': choose from test"):
        open_source(name, "train")


@pytest.mark.parametrize(
    ("header", "row", "message"),
    [
        ("path,label,label", "photos/1.png,a,b", "line 1: the field 'label' occurs twice"),
        ("path,label", "photos/1.png", "line 3: 1 fields; line 1 has 2"),
        ("path,label", ",a", "line 3: path is ''"),
        ("path,label", "photos/0.png,a", "photos/0.png occurs twice"),
        ("path,class", "photos/1.png,a", "line 1: no field 'class'"),
        ("path,split", "photos/1.png,test", "give path, and label or labels"),
        ("path,labels,split", "photos/1.png,1,tests", "line 3: no split 'tests'"),
        ("path,labels,split", "photos/1.png,1,test", "some lines name a split and some do not"),
        ("path,label", "photos/1.png,-1", "label -1 is below 0"),
        ("path,label", "photos/1.png,7000000", "number the classes from 0"),
        ("path,label", f"photos/1.png,{'7' * 20}", f"label {'7' * 20}; number the classes from 0"),
        ("path,label", f"photos/1.png,{'7' * 5000}", "label 7+ ... 7+; number the classes from 0"),
        ("path,label", "photos/\0.png,1", r"line 3: path is 'photos/\\x00.png'; give the path"),
        ("path,label", 'photos/1.png,"a', "line 3: unexpected end of data"),
    ],
)
def test_wrong_lines_are_refused_by_their_number(
    photos: Path, header: str, row: str, message: str
) -> None:
    first = "photos/0.png,0" + "," * (header.count(",") - 1)
    with pytest.raises(UsageError, match=message):
        open_source(write_csv(photos, header, [first, row]), "train")


@pytest.mark.parametrize(
    "spelling",
    ["./photos/0.png", "photos//0.png", "photos/../photos/0.png", "{photos}/0.png", "link/0.png"],
)
def test_an_image_under_two_spellings_is_there_twice(photos: Path, spelling: str) -> None:
    (photos.parent / "link").symlink_to("photos")
    rows = ["photos/0.png,a", f"{spelling.format(photos=photos)},b"]
    with pytest.raises(UsageError, match="0.png occurs twice.*; list each image once"):
        open_source(write_csv(photos, "path,label", rows), "train")


def test_a_spelling_moves_no_image_between_splits(photos: Path) -> None:
    expected = everything(write_csv(photos, "path,label", [f"photos/{i}.png,a" for i in range(40)]))
    for spelled in ("./photos", "photos/."):
        rows = [f"{spelled}/{i}.png,a" for i in range(40)]
        assert everything(write_csv(photos, "path,label", rows)) == expected


def test_class_names_are_read_as_editors_save_them(photos: Path) -> None:
    name = write_csv(photos, "path,label", [f"photos/{i}.png,{i % 2}" for i in range(40)])
    (photos.parent / "classes.txt").write_bytes("\ufeffcat \r\na\u2028dog\r\n".encode())
    assert open_source(name, "train").class_names == ("cat", "a\u2028dog")


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("{", "line 1: is not JSON"),
        ("3", "line 1: give an object"),
        ('{"path": "a.png", "label": 1.5}', "line 1: 1.5 is not a label"),
        ('{"path": "a.png", "label": [true]}', "line 1: True is not a label"),
        ('{"path": 3, "label": 1}', "line 1: path is 3"),
        (r'{"path": "a\u0000.png", "label": 1}', r"line 1: path is 'a\\x00.png'; give the path"),
        (r'{"path": "\ud800.png", "label": 1}', r"line 1: path is '\\ud800.png'; give the path"),
        ("[" * 100_000, "line 1: is not JSON"),
        ('{"path": "a.png", "label": 1, "labels": [1]}', "label and labels; give one"),
        ('{"path": "a.png", "label": 1, "label": 2}', "line 1: .*the field 'label' occurs twice"),
        ("", "no images in it"),
    ],
)
def test_wrong_json_lines_are_refused_by_their_number(
    tmp_path: Path, line: str, message: str
) -> None:
    (tmp_path / "list.jsonl").write_text(line)
    with pytest.raises(UsageError, match=message):
        open_source(f"manifest:{tmp_path / 'list.jsonl'}", "train")


def test_missing_files_are_counted_and_left_out_until_they_are_there(photos: Path) -> None:
    rows = [f"photos/{i}.png,{i % 2},{'test' if i < 20 else 'train'}" for i in range(42)]
    name = write_csv(
        photos, "path,label,split", [*rows, "gone.png,1,test", "photos,1,test", "", ""]
    )
    missing = r"4 of 44 .* read: .*/40.png \(no such file\); .*/photos \(not a regular file\)"
    with pytest.raises(UsageError, match=missing):
        open_source(name, "test")
    assert len(open_source(name, "test", REPLACE)) == 20
    shutil.copy(photos / "0.png", photos.parent / "gone.png")
    assert len(open_source(name, "test", REPLACE)) == 21
    with pytest.raises(UsageError, match="3 of 44 images"):
        open_source(name, "test")


def test_a_pipe_in_a_list_is_never_opened(photos: Path) -> None:
    """Opening one would wait for a program that writes to it."""
    name = write_csv(photos, "path,label", [f"photos/{i}.png,0" for i in range(40)])
    for i in range(40):
        (photos / f"{i}.png").unlink()
        os.mkfifo(photos / f"{i}.png")
    with pytest.raises(UsageError, match=r"0.png.*\(not a regular file\)"):
        open_source(name, "train")


def test_files_that_are_no_list_are_refused(tmp_path: Path) -> None:
    (tmp_path / "list.csv").write_bytes("path,label\na.png,ä".encode("latin-1"))
    with pytest.raises(UsageError, match="is not UTF-8"):
        open_source(f"manifest:{tmp_path / 'list.csv'}", "train")
    with pytest.raises(UsageError, match="no such file"):
        open_source(f"manifest:{tmp_path / 'gone.csv'}", "train")
    with pytest.raises(UsageError, match=r"ends with .csv or .jsonl"):
        open_source(f"manifest:{tmp_path / 'list.parquet'}", "train")


def test_a_list_is_read_once_until_it_or_an_image_changes(
    photos: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    rows = [f"photos/{i}.png,{i % 2}" for i in range(40)]
    name = write_csv(photos, "path,label", rows)
    source = open_source(name, "train")
    with monkeypatch.context() as patch:
        patch.setattr(manifest, "_build", None)  # so reading the list would fail
        patch.setattr(check, "_reason", None)
        again = open_source(name, "train")
    assert again.fingerprint() == source.fingerprint()
    os.utime(photos / "3.png", (0, 0))
    (photos / "4.png").write_bytes((photos / "4.png").read_bytes()[:40])
    with pytest.raises(UsageError, match=r"1 of 40 images cannot be read: .*/4.png"):
        open_source(name, "train")
    Image.new("RGB", (4, 4)).save(photos / "4.png")
    assert open_source(name, "train").fingerprint() != source.fingerprint()
    assert len(open_source(write_csv(photos, "path,label", rows[:30]), "train")) < len(source)


def test_a_repaired_image_of_a_long_list_is_read_again(photos: Path) -> None:
    """Of more than 64 images only a sample is compared with the list's index."""
    photo = (photos / "0.png").read_bytes()
    for i in range(130):
        (photos / f"{i}.png").write_bytes(photo[:40] if i == 1 else photo)
    name = write_csv(photos, "path,label", [f"photos/{i}.png,{i % 2}" for i in range(130)])
    for _ in range(2):
        with pytest.raises(UsageError, match=r"1 of 130 images cannot be read: .*/1.png"):
            open_source(name, "train")
    (photos / "1.png").write_bytes(photo)
    assert sum(len(open_source(name, split)) for split in SPLITS) == 130


def test_an_unreadable_image_is_left_out_of_evaluations_or_kept_for_replacement(
    photos: Path,
) -> None:
    rows = [f"photos/{i}.png,{i % 2},{'test' if i < 20 else 'train'}" for i in range(40)]
    name = write_csv(photos, "path,label,split", rows)
    for i in (0, 7, 19, 30):
        (photos / f"{i}.png").write_bytes((photos / f"{i}.png").read_bytes()[:40])
    test = open_source(name, "test", REPLACE)
    expected = {f"{i}.png": (str(i % 2),) for i in range(20) if i not in (0, 7, 19)}
    assert labeled(test) == expected
    assert {Path(path).name for path in test.skipped.unreadable} == {
        f"{i}.png" for i in (0, 7, 19, 30)
    }
    unpickled = pickle.loads(pickle.dumps(test))
    assert labeled(unpickled) == expected and unpickled.fingerprint() == test.fingerprint()
    rest = [open_source(name, split, REPLACE) for split in ("train", "validation")]
    bad = [
        source for source in rest for i in range(len(source)) if source.path(i).endswith("30.png")
    ]
    assert len(bad) == 1 and sum(map(len, rest)) == 20 - (bad[0] is rest[1])
