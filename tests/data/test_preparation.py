"""The scripts that write ArrayRecord data sets: from ImageNet's archives, and from any folder."""

import importlib
import io
import json
import os
import signal
import subprocess
import sys
import tarfile
from collections.abc import Callable, Mapping
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from tests.command import ROOT, TIMEOUT
from vmoe.class_names import class_names
from vmoe.data.decode import decode
from vmoe.data.sources import SPLITS, Source, open_source, relabel

SYNSETS = ("n01440764", "n02099601", "n03445777")  # of the labels, in their order
IDENTIFIERS = (2, 3, 1)  # of these classes in the devkit
COUNTS = (5, 3, 4)


@pytest.fixture
def run(
    monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> Callable[..., tuple[str, str]]:
    """Runs a script in this process, which has imported its libraries; returns its output and why
    it stopped, if it did."""

    def script(name: str, *arguments: object) -> tuple[str, str]:
        monkeypatch.setattr(sys, "argv", [name, *map(str, arguments)])
        try:
            importlib.import_module(f"scripts.prepare.{name}").main()
        except SystemExit as stop:
            return capfd.readouterr().out, str(stop)
        return capfd.readouterr().out, ""

    return script


def image(value: int, form: str = "jpeg") -> bytes:
    file = io.BytesIO()
    Image.fromarray(np.full((8, 8, 3), value, np.uint8)).save(file, form)
    return file.getvalue()


def write_tar(path: Path, files: Mapping[str, bytes], mode: str = "w") -> None:
    with tarfile.open(path, mode) as archive:
        for name, content in files.items():
            member = tarfile.TarInfo(name)
            member.size = len(content)
            archive.addfile(member, io.BytesIO(content))


def meta() -> bytes:
    """The list of classes in the devkit's form; the last class is not a leaf."""
    from scipy.io import savemat

    fields = [
        *(("ILSVRC2012_ID", float), ("WNID", object), ("words", object)),
        *(("num_children", float), ("num_train_images", float)),
    ]
    rows = [
        (number, synset, "a word", 0, count)
        for number, synset, count in zip(IDENTIFIERS, SYNSETS, COUNTS, strict=True)
    ]
    synsets = np.array([*sorted(rows), (4, "n00001740", "entity", 3, 0)], fields)
    file = io.BytesIO()
    savemat(file, {"synsets": synsets[:, None]})
    return file.getvalue()


@pytest.fixture
def archives(tmp_path: Path) -> Path:
    """The archives of twelve training and six validation images of three classes.

    All pixels of a training image have the value 50 x label + number, of a validation image its
    number.
    """
    root = tmp_path / "archives"
    root.mkdir()
    train = {}
    for label in (2, 0, 1):
        files = {
            f"{SYNSETS[label]}_{i}.JPEG": image(50 * label + i, "png" if i == 1 else "jpeg")
            for i in range(COUNTS[label])
        }
        write_tar(root / "class.tar", files)
        train[f"{SYNSETS[label]}.tar"] = (root / "class.tar").read_bytes()
    write_tar(root / "train.tar", train)
    names = [f"ILSVRC2012_val_{i:08}.JPEG" for i in (4, 1, 2, 6, 3, 5)]
    write_tar(root / "val.tar", {name: image(int(name[15:23])) for name in names})
    truth = "".join(f"{IDENTIFIERS[i % 3]}\n" for i in range(1, 7))
    folder = "ILSVRC2012_devkit_t12/data"
    devkit = {
        f"{folder}/meta.mat": meta(),
        f"{folder}/ILSVRC2012_validation_ground_truth.txt": truth.encode(),
    }
    write_tar(root / "devkit.tar.gz", devkit, "w:gz")
    real = [[0, 2], [1], [], [2], [0], []]
    (root / "real.json").write_text(json.dumps(real))
    return root


def words(archives: Path, *more: object) -> list[object]:
    """The arguments of ``scripts.prepare.imagenet``."""
    line = ["--devkit", archives / "devkit.tar.gz", "--train", archives / "train.tar"]
    line += ["--validation", archives / "val.tar", *more]
    return ["imagenet", archives.parent / "tfds", *line]


def examples(source: Source) -> dict[int, tuple[int, ...]]:
    """The labels of each image by the value of its pixels."""
    return {
        int(decode(source[i].image, "").mean().round()): source[i].labels
        for i in range(len(source))
    }


def test_imagenet_is_read_from_its_archives_and_real_labels_from_their_file(
    archives: Path, run: Callable[..., tuple[str, str]], monkeypatch: pytest.MonkeyPatch
) -> None:
    output, stopped = run(*words(archives, "--real", archives / "real.json"))
    assert not stopped, stopped
    assert "12 train, 6 validation images" in output and "2 of 6 images have no label" in output
    monkeypatch.setenv("TFDS_DATA_DIR", str(archives.parent / "tfds"))
    train = open_source("tfds:imagenet2012", "train")
    assert train.class_names == SYNSETS
    expected = {50 * label + i: (label,) for label in range(3) for i in range(COUNTS[label])}
    assert examples(train) == expected
    assert {len(open_source("tfds:imagenet2012", f"train[{s}]")) for s in (":50%", "50%:")} == {6}
    validation = open_source("tfds:imagenet2012", "validation")
    assert examples(validation) == {i: (i % 3,) for i in range(1, 7)}
    real = open_source("tfds:imagenet2012_real", "validation")
    assert examples(real) == {1: (0, 2), 2: (1,), 3: (), 4: (2,), 5: (0,), 6: ()}
    assert real.max_labels == 2
    as_model = relabel(validation, class_names("imagenet_1k"))
    names = {value: as_model.class_names[label] for value, (label,) in examples(as_model).items()}
    assert (names[3], names[1]) == ("tench", "golden retriever")
    output, stopped = run(*words(archives))
    assert "is complete already" in output and not stopped


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("train.tar", "train.tar: truncated"),
        ("val.tar", "val.tar: truncated"),
        ("devkit.tar.gz", "devkit.tar.gz: is not the devkit, or is truncated"),
        ("real.json", "real.json: cannot be read"),
    ],
)
def test_a_truncated_archive_is_refused(
    archives: Path, run: Callable[..., tuple[str, str]], name: str, message: str
) -> None:
    content = (archives / name).read_bytes()
    (archives / name).write_bytes(content[: len(content) // 2])
    _, stopped = run(*words(archives, "--real", archives / "real.json"))
    assert message in stopped and "\n" not in stopped


def test_missing_images_are_refused_by_class(
    archives: Path, run: Callable[..., tuple[str, str]]
) -> None:
    write_tar(archives / "class.tar", {f"{SYNSETS[0]}_0.JPEG": image(0)})
    write_tar(archives / "train.tar", {f"{SYNSETS[0]}.tar": (archives / "class.tar").read_bytes()})
    assert "class n01440764 has 1 of 5 images" in run(*words(archives))[1]
    write_tar(archives / "val.tar", {"ILSVRC2012_val_00000001.JPEG": image(1)})
    assert "1 of 6 numbered images" in run(*words(archives))[1]


@pytest.mark.process
def test_a_folder_keeps_its_splits_classes_and_images(
    tmp_path: Path, run: Callable[..., tuple[str, str]]
) -> None:
    for label, name in enumerate(["cats", "dogs"]):
        (tmp_path / "photos" / name).mkdir(parents=True)
        for i in range(30):
            path = tmp_path / "photos" / name / f"{i}.png"
            path.write_bytes(image(100 * label + i, "png"))
    script = [sys.executable, "-m", "scripts.prepare.folder"]
    script += [tmp_path / "photos", tmp_path / "tfds" / "photos"]
    subprocess.run(script, check=True, capture_output=True, cwd=ROOT)
    for split in SPLITS:
        folder = open_source(f"folder:{tmp_path / 'photos'}", split)
        prepared = open_source(f"tfds:{tmp_path / 'tfds' / 'photos'}", split)
        assert prepared.class_names == folder.class_names == ("cats", "dogs")
        assert examples(prepared) == examples(folder) and len(prepared) == len(folder)
    _, stopped = run("folder", tmp_path / "nowhere", tmp_path / "tfds" / "nowhere")
    assert "nowhere: no such folder" in stopped


@pytest.mark.process
def test_an_interrupt_while_a_script_starts_is_one_line(tmp_path: Path) -> None:
    script = ["-m", "scripts.prepare.folder", tmp_path / "photos", tmp_path / "out"]
    command = [sys.executable, "-X", "importtime", *script]
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True, cwd=ROOT) as process:
        assert process.stderr
        next(line for line in process.stderr if "numpy" in line)  # is being imported
        process.send_signal(signal.SIGINT)
        lines = list(process.stderr)  # the main thread may import once more before the end
    assert process.returncode == 130
    lines = [line for line in lines if not line.startswith("import time:")]
    assert lines == ["vmoe: interrupted by SIGINT\n"]


def test_a_whole_folder_is_one_split_with_every_image_also_of_a_class_of_one(
    tmp_path: Path, run: Callable[..., tuple[str, str]]
) -> None:
    expected = {10 * i: (0,) for i in range(12)} | {200: (1,)}
    for value, (label,) in expected.items():
        path = tmp_path / "photos" / ("cats", "okapis")[label] / f"{value}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(image(value, "png"))
    line = ["folder", tmp_path / "photos", tmp_path / "tfds" / "photos"]
    assert "class 'okapis' has 1 images, too few to split off" in run(*line)[1]
    output, stopped = run(*line, "--whole")
    assert not stopped and "13 train images" in output
    name = f"tfds:{tmp_path / 'tfds' / 'photos'}"
    assert examples(open_source(name, "train[:100%]")) == expected
    held_out, rest = (examples(open_source(name, f"train[{s}]")) for s in (":3", "3:"))
    assert held_out | rest == expected and (len(held_out), len(rest)) == (3, 10)
    assert not list((tmp_path / "tfds" / "photos" / "1.0.0").glob("*-test*"))
    (tmp_path / "photos").rename(tmp_path / "train")
    _, stopped = run("folder", tmp_path, tmp_path / "tfds" / "split", "--whole")
    assert "is split into folders (train); give one of them as a whole" in stopped


@pytest.mark.parametrize("name", ["my-photos", "photos.v2", "2photos"])
def test_a_name_that_tfds_refuses_is_refused_before_an_image_is_read(
    tmp_path: Path, run: Callable[..., tuple[str, str]], name: str
) -> None:
    _, stopped = run("folder", tmp_path / "nowhere", tmp_path / name)
    assert stopped.startswith(f"'{name}' is no name of a data set; use letters") and not list(
        tmp_path.iterdir()
    )


@pytest.mark.process
def test_a_signal_ends_a_script_in_one_line(tmp_path: Path) -> None:
    devkit = tmp_path / "devkit"
    os.mkfifo(devkit)
    script = [sys.executable, "-m", "scripts.prepare.imagenet", tmp_path]
    archives = ["--devkit", devkit, "--train", "train.tar", "--validation", "validation.tar"]
    with (
        subprocess.Popen(
            [*script, *archives], stderr=subprocess.PIPE, text=True, cwd=ROOT
        ) as process,
        open(devkit, "wb"),  # waits until the script reads it
    ):
        process.send_signal(signal.SIGINT)
        _, error = process.communicate(timeout=TIMEOUT)
    assert process.returncode == 130 and "Traceback" not in error, error
