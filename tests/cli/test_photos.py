"""A folder of photos through the real commands: odd names, unreadable images, changed files."""

import json
import shutil
from pathlib import Path
from subprocess import CompletedProcess

import numpy as np
import pytest
from PIL import Image

from tests.command import TINY, forked, vmoe, without_times
from tests.run_folder import rows
from vmoe.config.data import ImageChecks
from vmoe.data.sources import open_source
from vmoe.errors import Failure
from vmoe.train.sinks import CsvFile

REPLACE = ImageChecks(on_error="replace")

CLASSES = ("a\nb", "c\rd", "e\u2028f", "\u00e9toile")
COUNT = 15  # photos of a class


TRAIN = ["--data.name", "folder:photos", "--batch-size", "16", "--steps", "30", "--log-every", "10"]


def train(folder: Path, *options: str) -> CompletedProcess[str]:
    return vmoe("train", "--config", TINY, "--workdir", "run", *TRAIN, *options, cwd=folder)


def write_photo(path: Path, seed: int) -> None:
    pixels = np.random.default_rng(seed).integers(0, 255, (40, 48, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(path)


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with ``photos``, and ``run``, which was trained on them; no test changes it."""
    folder = tmp_path_factory.mktemp("trained")
    for i, name in enumerate(CLASSES):
        (folder / "photos" / name).mkdir(parents=True)
        for j in range(COUNT):
            write_photo(folder / "photos" / name / f"{j}.png", i * COUNT + j)
    (folder / "photos" / CLASSES[0] / "notes.txt").write_text("not a photo")
    (folder / "elsewhere").mkdir()
    (folder / "photos" / CLASSES[3] / "more").symlink_to(folder / "elsewhere")
    result = train(folder)
    assert result.returncode == 0, result.stderr
    lines = without_times(result.stderr)
    assert lines[0].startswith("46 images of 4 classes (10 logits), "), lines
    assert "resized to 8 px, read by 2 threads; " in lines[0] and " validation" in lines[0]
    assert "the model has 10 logits for 4 classes; 6 are unused" in lines
    assert any("are shrunk more than fourfold to 8 px, such as photos/" in line for line in lines)
    assert sum("notes.txt" in line for line in lines) == 1
    assert any(line.startswith("skipped 1 symbolic link to a folder: photos/") for line in lines)
    return folder


@pytest.fixture
def copy(trained: Path, tmp_path: Path) -> Path:
    """A copy of that folder, with the same times."""
    shutil.copytree(trained, tmp_path / "copy", symlinks=True)
    return tmp_path / "copy"


@pytest.mark.process
def test_classes_with_any_utf_8_name_are_trained_evaluated_and_predicted(trained: Path) -> None:
    result = vmoe("evaluate", "--checkpoint", "run", "--json", "--per-class", cwd=trained)
    assert result.returncode == 0, result.stderr
    report = json.loads(result.stdout)
    assert tuple(report["per_class"]) == CLASSES
    assert "top5_accuracy" not in report, "there are four classes"
    image = next((trained / "photos" / CLASSES[3]).glob("*.png"))
    result = vmoe("predict", "--checkpoint", "run", image, "--top", "4", cwd=trained)
    assert result.returncode == 0, result.stderr
    assert CLASSES[3] in result.stdout and "a\\nb" in result.stdout


@pytest.mark.process
def test_classes_with_any_utf_8_name_are_printed_on_streams_of_ascii(copy: Path) -> None:
    shutil.rmtree(copy / "run")
    image = next((copy / "photos" / CLASSES[3]).glob("*.png"))
    for arguments in (
        ("train", "--config", TINY, "--workdir", "run", *TRAIN),
        ("evaluate", "--checkpoint", "run", "--per-class"),
        ("predict", "--checkpoint", "run", image, "--top", "4"),
    ):
        result = forked(*arguments, cwd=copy, environment={"PYTHONIOENCODING": "ascii"})
        assert result.returncode == 0, result.stderr
    assert "\\xe9toile" in result.stdout and "a\\nb" in result.stdout


@pytest.mark.process
def test_a_finished_run_is_already_complete_and_copied_photos_are_the_same_data(
    copy: Path,
) -> None:
    """Rows after its checkpoint are written again, and a lost file starts anew."""
    before = {name: rows(copy / "run", name) for name in ("metrics", "evaluations")}
    for path in (copy / "photos").rglob("*.png"):
        path.touch()
    with (copy / "run" / "metrics.csv").open("a") as file:
        file.write("40,1.0,0.5\r\n50,0.9")
    (copy / "run" / "experts.csv").unlink()
    result = train(copy)
    assert result.returncode == 0, result.stderr
    assert "run: already complete (30 of 30 steps)" in result.stderr
    assert "other modification times" in result.stderr
    assert "has changed" not in result.stderr
    assert {name: rows(copy / "run", name) for name in before} == before
    assert "run/experts.csv is missing: its rows up to step 30 are lost; starting" in result.stderr


@pytest.mark.process
def test_photos_that_were_changed_in_place_are_reported(copy: Path) -> None:
    for path in (copy / "photos").rglob("*.png"):
        size = path.stat().st_size
        with Image.open(path) as image:
            pixels = np.asarray(image)[::-1]
        Image.fromarray(pixels).save(path)
        assert abs(path.stat().st_size - size) < 100
    result = train(copy)
    assert result.returncode == 0, result.stderr
    assert "the training data has changed since this run began (" in result.stderr
    assert "evaluation set 'validation' has changed since this run began (" in result.stderr


@pytest.mark.process
def test_all_unreadable_photos_are_listed_before_training_or_replaced_and_left_out(
    copy: Path,
) -> None:
    broken = [copy / "photos" / CLASSES[2] / f"{i}.png" for i in (3, 7, 11)]
    for path in broken:
        path.write_bytes(path.read_bytes()[:-20])
    (copy / "photos" / CLASSES[2] / "4.png").unlink()
    integers = Image.fromarray(np.arange(1600, dtype=np.int32).reshape(40, 40))
    integers.save(copy / "photos" / CLASSES[2] / "4.tif")
    # its header and its end are as they should be
    within = Path(open_source(f"folder:{copy / 'photos'}", "validation", REPLACE)[0].origin)
    content = bytearray(within.read_bytes())
    content[1000:1100] = bytes(100)
    within.write_bytes(content)
    shutil.rmtree(copy / "run")
    result = train(copy)
    assert result.returncode == 2 and not (copy / "run").exists()
    assert result.stderr.count("\n") == 1 and "4 of 60 images cannot be read: " in result.stderr
    for path in broken:
        assert f"{path.name} (truncated: its end is missing)" in result.stderr
    assert "4.tif (32-bit integers (mode I); save it with 8 bits per channel)" in result.stderr
    result = train(copy, "--data.on-error", "replace")
    assert result.returncode == 0, result.stderr
    assert " 4 images cannot be read: " in result.stderr
    assert "; replaced by another image (" in result.stderr
    assert result.stderr.count("; left out of evaluations (1 so far)\n") == 1
    result = vmoe(
        "evaluate", "--checkpoint", "run", "--data", "folder:photos:validation", "--json", cwd=copy
    )
    validation = open_source(f"folder:{copy / 'photos'}", "validation", REPLACE)
    assert json.loads(result.stdout)["images"] == len(validation) - 1
    assert f"{within.name}: cannot be read as an image" in result.stderr


@pytest.mark.process
def test_the_other_images_are_predicted_if_one_cannot_be_read(copy: Path) -> None:
    images = sorted((copy / "photos" / CLASSES[1]).glob("*.png"))
    images[4].write_bytes(images[4].read_bytes()[:1000])
    result = vmoe("predict", "--checkpoint", "run", "--json", *images, cwd=copy)
    assert result.returncode == 1
    assert len(json.loads(result.stdout)) == COUNT - 1
    line = f"vmoe: 1 of {COUNT} images have no prediction: "
    assert result.stderr.startswith(line) and result.stderr.count("\n") == 1


@pytest.mark.process
def test_class_names_that_are_not_utf_8_are_refused(copy: Path) -> None:
    (copy / "photos" / CLASSES[0]).rename(str(copy / "photos") + "/\udcff")
    result = train(copy)
    assert result.returncode == 2 and result.stderr.count("\n") == 1
    assert "the name of class b'\\xff' is not UTF-8; rename its folder" in result.stderr


@pytest.mark.process
def test_a_csv_file_that_a_checkpoint_does_not_match_is_reported_and_left_unchanged(
    copy: Path,
) -> None:
    path = copy / "run" / "experts.csv"
    changed = path.read_bytes().replace(b",", b";", 1)
    path.write_bytes(changed)
    result = train(copy)
    assert result.returncode == 1 and "Traceback" not in result.stderr
    last = result.stderr.splitlines()[-1]
    assert last.startswith("vmoe: run/experts.csv is corrupt (its content has changed"), last
    assert path.read_bytes() == changed


@pytest.mark.parametrize("keep", [7, 60])  # inside the header; inside a row
def test_a_csv_file_that_is_shorter_than_its_checkpoint_says_is_corrupt(
    keep: int, tmp_path: Path
) -> None:
    path = tmp_path / "metrics.csv"
    file = CsvFile(path)
    for step in (10, 20, 30):
        file.append(step, [{"loss": 1 / step, "accuracy": step / 70}])
    position, content = file.position(), path.read_bytes()[:keep]
    assert not CsvFile(path).restore(30, position)
    path.write_bytes(content)
    with pytest.raises(Failure, match=f"metrics.csv is corrupt .cut off after {keep} bytes since"):
        CsvFile(path).restore(30, position)
    assert path.read_bytes() == content
