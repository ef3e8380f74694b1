"""A checkpoint that cannot be read is not corrupt: nothing is moved, and it is used when it can."""

import shutil
import time
from pathlib import Path

import pytest

from tests.command import vmoe
from vmoe.checkpoints import read
from vmoe.checkpoints.restore import read_metrics
from vmoe.errors import Failure

LOOP = "cannot be read (Too many levels of symbolic links); run the command again"


@pytest.fixture
def run(tiny_run: Path, tmp_path: Path) -> Path:
    """A copy of a run with one checkpoint."""
    return Path(shutil.copytree(tiny_run, tmp_path / "run"))


def test_a_run_whose_checkpoint_cannot_be_read_changes_nothing_and_goes_on_later(
    run: Path,
) -> None:
    """A link to itself cannot be opened, by root neither, and is no missing file."""
    read_later = run / "checkpoints" / "60" / "params" / "manifest.ocdbt"
    content = read_later.read_bytes()
    read_later.unlink()
    read_later.symlink_to(read_later)
    before = sorted(run.rglob("*"))
    result = vmoe("train", "--config", run / "config.json", "--workdir", run)
    assert result.returncode == 1, result.stderr
    assert f"{run}/checkpoints/60: {LOOP}" in result.stderr.splitlines()[-1]
    assert sorted(run.rglob("*")) == before
    read_later.unlink()
    read_later.write_bytes(content)
    assert read(run).step == 60


def test_no_file_that_cannot_be_read_makes_a_checkpoint_corrupt(
    run: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    step, refused = run / "checkpoints" / "60", 0
    for file in [path for path in step.rglob("*") if path.is_file()]:
        kept = file.rename(run / "kept")
        file.symlink_to(file)
        try:
            read(step)  # a file that it does not need, such as those of the optimiser
        except Failure as error:
            assert LOOP in str(error), file
            refused += 1
        kept.replace(file)
    assert refused > 5 and not capsys.readouterr().err


def test_only_a_file_that_stays_away_makes_a_checkpoint_corrupt(
    run: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    step, kept, waited = run / "checkpoints" / "60", run / "kept", 0
    for file in [path for path in step.rglob("*") if path.is_file()]:
        file.rename(kept)
        monkeypatch.setattr(time, "sleep", lambda _, file=file: kept.replace(file))
        assert read(step).step == 60, file
        if kept.exists():  # a file that it does not need
            kept.replace(file)
        else:
            waited += 1
    assert waited >= 3 and not capsys.readouterr().err
    monkeypatch.setattr(time, "sleep", lambda _: None)
    shutil.rmtree(step / "checksums")
    with pytest.raises(Failure, match="no intact checkpoint"):
        read(run)
    assert "checkpoint 60 is corrupt (metadata unreadable)" in capsys.readouterr().err


def test_every_checkpoint_that_was_moved_can_be_put_back_by_the_command_in_the_message(
    run: Path,
) -> None:
    (run / "checkpoints" / "corrupt").mkdir()
    moved = (run / "checkpoints" / "60").rename(run / "checkpoints" / "corrupt" / "60")
    with pytest.raises(Failure, match=rf"put it back \(mv {moved} {run}/checkpoints/\), or start"):
        read(run)


def test_metrics_that_cannot_be_read_are_not_to_be_removed(tmp_path: Path) -> None:
    metrics = tmp_path / "checkpoints" / "metrics.json"
    metrics.parent.mkdir()
    metrics.symlink_to(metrics)
    with pytest.raises(Failure) as error:
        read_metrics(tmp_path)
    assert str(error.value) == f"{metrics}: {LOOP} when it can"
