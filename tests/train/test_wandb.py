"""Weights & Biases, offline: what a run logs is read from the files that `wandb sync` uploads."""

import json
import shutil
import signal
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from tests.command import TINY, forked, start
from tests.events import pictures, scalars
from tests.run_folder import last_step

pytestmark = [pytest.mark.process, pytest.mark.slow]
pytest.importorskip("wandb", reason="the extra wandb is not installed")

TRAIN = ["train", "--config", TINY]
CONFIG = ["--log-every", "10", "--steps", "400", "--evaluate-every", "200"]
OFFLINE = {"WANDB_MODE": "offline"}
BLOCK, HEADER = 32768, 7  # of the log format of LevelDB, in bytes


def records(folder: Path) -> Iterator[Any]:
    """The records of the file in a folder of an offline run, oldest first."""
    from wandb.proto.wandb_internal_pb2 import Record

    (path,) = folder.glob("*.wandb")
    content, position, parts = path.read_bytes(), HEADER, b""
    while position + HEADER <= len(content):
        if BLOCK - position % BLOCK < HEADER:  # the rest of a block is padding
            position += BLOCK - position % BLOCK
            continue
        length = int.from_bytes(content[position + 4 : position + 6], "little")
        kind = content[position + 6]  # 1: whole; 2, 3, 4: first, middle and last part
        position += HEADER
        parts += content[position : position + length]
        position += length
        if kind in (1, 4):
            yield Record.FromString(parts)
            parts = b""


def folders(workdir: Path) -> list[Path]:
    """The records of the offline runs, oldest first."""
    return sorted((workdir / "wandb").glob("offline-run-*"))


def history(folder: Path) -> Iterator[tuple[int, dict[str, Any]]]:
    """The step and the values of each row."""
    for record in records(folder):
        if record.WhichOneof("record_type") == "history":
            row: dict[str, Any] = {}
            for item in record.history.item:
                tag, *field = item.nested_key or [item.key]
                value = json.loads(item.value_json)
                if field:  # of a picture
                    row.setdefault(tag, {})[field[0]] = value
                else:
                    row[tag] = value
            yield row["step"], row


@pytest.fixture(scope="module")
def workdir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run that is stopped by a signal and resumed."""
    workdir = tmp_path_factory.mktemp("wandb") / "run"
    line = [*TRAIN, "--workdir", str(workdir), *CONFIG]
    with start(*line, "--wandb", "digits", environment=OFFLINE) as process:
        process.wait_until(lambda: last_step(workdir) >= 20)
        process.send_signal(signal.SIGTERM)
        assert process.wait() == 75, process.stderr
        (folder,) = folders(workdir)
        assert f"wandb: offline; `wandb sync {folder}` uploads it" in process.stderr
    result = forked(*line, "--wandb", environment=OFFLINE)
    assert result.returncode == 0, result.stderr
    return workdir


def test_a_resumed_run_continues_its_wandb_run_and_each_part_ends_with_its_exit_status(
    workdir: Path,
) -> None:
    parts = [list(records(folder)) for folder in folders(workdir)]
    assert len(parts) == 2
    runs, exits, kinds = [], [], []
    for part in parts:
        kinds.append({record.WhichOneof("record_type") for record in part})
        runs += [(r.run.run_id, r.run.project) for r in part if r.HasField("run")][:1]
        exits += [record.exit.exit_code for record in part if record.HasField("exit")]
    stored = json.loads((workdir / "wandb.json").read_text())
    assert runs == [(stored["id"], "digits")] * 2
    assert exits == [75, 0]
    assert ["preempting" in kind for kind in kinds] == [True, False]


def test_wandb_has_the_scalars_of_tensorboard(workdir: Path) -> None:
    logged = {
        (tag.replace(" ", "_"), step): value
        for folder in folders(workdir)
        for step, row in history(folder)
        for tag, value in row.items()
        if tag != "step" and not tag.startswith("_") and not isinstance(value, dict)
    }
    expected = scalars(workdir)
    assert logged.keys() == expected.keys()
    for key, value in expected.items():
        assert logged[key] == pytest.approx(value, rel=1e-5), key


def test_wandb_has_the_pictures_of_tensorboard(workdir: Path) -> None:
    logged = {
        (tag, step): np.asarray(Image.open(folder / "files" / value["path"]))
        for folder in folders(workdir)
        for step, row in history(folder)
        for tag, value in row.items()
        if isinstance(value, dict) and not tag.startswith("_")
    }
    expected = pictures(workdir)
    assert logged.keys() == expected.keys() and len(expected) == 3
    for key, picture in expected.items():
        np.testing.assert_array_equal(logged[key], picture)


def test_a_failed_run_ends_its_wandb_run_with_status_1_and_its_own_error(tmp_path: Path) -> None:
    result = forked(
        *[*TRAIN, "--workdir", tmp_path, "--wandb", "--steps", "9", "--optim.lr", "1e38"],
        *["--optim.warmup-steps", "0", "--optim.grad-clip-norm", "None"],
        environment=OFFLINE,
    )
    assert result.returncode == 1
    assert result.stderr.splitlines()[-1].startswith("vmoe: step "), result.stderr
    (folder,) = folders(tmp_path)
    assert [r.exit.exit_code for r in records(folder) if r.HasField("exit")] == [1]


def test_what_keeps_wandb_from_starting_is_one_line_and_nothing_is_written(tmp_path: Path) -> None:
    line = [*TRAIN, "--workdir", str(tmp_path / "run"), "--steps", "30", "--wandb"]
    result = forked(*line, environment={"HOME": str(tmp_path), "WANDB_MODE": "online"})
    assert result.returncode == 2
    assert result.stderr == (
        "vmoe: wandb: not logged in; run `wandb login`, or set WANDB_MODE=offline\n"
    )
    assert not (tmp_path / "run").exists()


def test_a_run_without_a_checkpoint_starts_in_another_project_as_another_wandb_run(
    workdir: Path, tmp_path: Path
) -> None:
    before = json.loads((workdir / "wandb.json").read_text())
    for name, *options in (("same",), ("other", "--steps", "30", "--optim.warmup-steps", "9")):
        run = tmp_path / name
        run.mkdir()
        for path in workdir.glob("*.json"):
            shutil.copy(path, run)
        line = [*TRAIN, "--workdir", run, *CONFIG, *options, "--wandb", "other"]
        result = forked(*line, environment=OFFLINE)
        assert result.returncode == 0, result.stderr
        (folder,) = folders(run)
        (started,) = (record.run for record in records(folder) if record.HasField("run"))
        now = {"id": started.run_id, "project": started.project}
        assert json.loads((run / "wandb.json").read_text()) == now
        assert now["project"] == "other" and now["id"] != before["id"]


def test_another_project_is_refused(workdir: Path) -> None:
    line = [*TRAIN, "--workdir", str(workdir), *CONFIG]
    result = forked(*line, "--wandb", "other", environment=OFFLINE)
    assert result.returncode == 2
    assert f"wandb=other: the run in {workdir} is in the project digits" in result.stderr
    result = forked(*line, "--wandb", "one", "two")
    assert result.returncode == 2 and "wandb=one two: give one project" in result.stderr
