"""A checkpoint that cannot be read is not corrupt: nothing is moved, and it is used when it can."""

import errno
import json
import os
import shutil
import time
from collections.abc import Callable, Iterable
from pathlib import Path

import numpy as np
import pytest

from tests.command import vmoe
from tests.data.open_files import no_more_files
from vmoe.checkpoints import chunked, npz, read, safetensors_files
from vmoe.checkpoints.arrays import ArrayFile
from vmoe.checkpoints.restore import sha256_of
from vmoe.checkpoints.run import Checkpoints
from vmoe.errors import Failure, UsageError
from vmoe.host import retry

GOLDEN = Path(__file__).parents[1] / "golden"
WEIGHTS: dict[str, tuple[Callable[[Path], ArrayFile], Path]] = {
    "npz": (npz.read, GOLDEN / "weights" / "augreg" / "model.npz"),
    "published": (chunked.read, GOLDEN / "published" / "sharded" / "ckpt"),
    "safetensors": (safetensors_files.read, GOLDEN / "weights" / "timm_vit" / "model.safetensors"),
    "index": (
        safetensors_files.read,
        GOLDEN / "weights" / "hf_vit_shards" / "model.safetensors.index.json",
    ),
}

LOOP = "cannot be read (Too many levels of symbolic links); restore it, or move it away"


@pytest.fixture
def run(tiny_run: Path, tmp_path: Path) -> Path:
    """A copy of a run with one checkpoint."""
    return Path(shutil.copytree(tiny_run, tmp_path / "run"))


def test_a_run_whose_checkpoint_cannot_be_read_changes_nothing_and_goes_on_later(
    run: Path,
) -> None:
    """A link to itself cannot be opened, not even by root, and is not a missing file."""
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


@pytest.mark.process
def test_no_file_that_cannot_be_read_makes_a_checkpoint_corrupt(
    run: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    step, refused = run / "checkpoints" / "60", 0
    for file in [path for path in step.rglob("*") if path.is_file()]:
        kept = file.rename(run / "kept")
        file.symlink_to(file)
        try:
            read(step)  # a file that it does not need, such as the optimizer's files
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


def test_a_step_is_read_again_after_an_error_that_passes(
    run: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The first byte of a process's memory is not there: reading it is an input/output error."""
    step, kept = run / "checkpoints" / "60", run / "kept"
    file = next((step / "checksums").iterdir())
    file.rename(kept)
    file.symlink_to("/proc/self/mem")
    monkeypatch.setattr(time, "sleep", lambda _: None)
    with pytest.raises(Failure, match=rf"^{step}: cannot be read now \(Input/output error\); run"):
        read(step)
    monkeypatch.setattr(time, "sleep", lambda _: kept.replace(file))
    assert read(step).step == 60


def test_a_step_that_is_deleted_while_it_is_read_is_not_called_corrupt(
    run: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    step = run / "checkpoints" / "60"
    shutil.rmtree(step / "params")  # training deletes the rest meanwhile
    monkeypatch.setattr(time, "sleep", lambda _: shutil.rmtree(step))
    with pytest.raises(UsageError, match="no checkpoint yet"):
        read(run)
    assert capsys.readouterr().err == f"{run}: checkpoint 60 was deleted meanwhile\n"


def test_a_step_that_is_deleted_while_it_is_read_is_replaced_by_a_newer_one(
    run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As a run that keeps only its newest checkpoint does while it trains."""
    step, newer = run / "checkpoints" / "60", tmp_path / "newer"
    step.rename(newer)
    step.mkdir()
    monkeypatch.setattr(time, "sleep", lambda _: (step.rmdir(), renumbered(newer, step, 80)))
    assert read(run).step == 80


def test_a_file_in_the_place_of_the_folder_for_corrupt_checkpoints_is_named(run: Path) -> None:
    (run / "checkpoints" / "corrupt").touch()
    shutil.rmtree(run / "checkpoints" / "60" / "params")
    with (
        Checkpoints(run, every=20, keep_latest=1) as checkpoints,
        pytest.raises(
            Failure, match=r"corrupt: cannot be written .*; move what is there away, and"
        ),
    ):
        checkpoints.restore_newest(params={})


def renumbered(source: Path, step: Path, number: int) -> None:
    """Makes a checkpoint out of another one, as if it had been written at that step."""
    index = source / "checksums" / "metadata"
    content = json.loads(index.read_text())
    content |= {"step": number}
    del content["sha256"]
    index.write_text(json.dumps(content | {"sha256": sha256_of(content)}))
    source.rename(step.with_name(str(number)))


@pytest.mark.parametrize("make", [shutil.copytree, Path.symlink_to], ids=["copy", "link"])
def test_a_checkpoint_under_the_name_of_another_step_is_not_believed(
    run: Path, make: Callable[[Path, Path], object], capsys: pytest.CaptureFixture[str]
) -> None:
    step, other = run / "checkpoints" / "60", run / "checkpoints" / "80"
    make(*((other, step) if make is Path.symlink_to else (step, other)))
    assert read(run).step == 60
    message = f"{run}: checkpoint 80 is corrupt (it is a copy of checkpoint 60)\n"
    assert capsys.readouterr().err == message
    with pytest.raises(Failure, match="no intact checkpoint"):
        read(other)


def arrays(file: ArrayFile) -> dict[str, np.ndarray]:
    return dict(file.read(file.infos))


def equal(first: dict[str, np.ndarray], second: dict[str, np.ndarray]) -> bool:
    return first.keys() == second.keys() and all((first[x] == second[x]).all() for x in first)


@pytest.mark.parametrize("name", WEIGHTS)
def test_weights_that_cannot_be_opened_now_are_neither_missing_nor_corrupt(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    open_weights, path = WEIGHTS[name]
    file = open_weights(path)
    expected = arrays(file)
    with no_more_files(until_retry=True):
        assert equal(arrays(file), expected)
    with no_more_files(until_retry=True):
        assert equal(arrays(open_weights(path)), expected)
    monkeypatch.setattr(retry, "PAUSES", ())
    for use in (lambda: open_weights(path), lambda: arrays(file)):
        with no_more_files(), pytest.raises(Failure, match=r"cannot be read now \(Too many open"):
            use()


@pytest.mark.parametrize("name", ["npz", "published"])
def test_weights_whose_bytes_cannot_be_read_now_are_not_corrupt(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """``os.readv`` fails as for a file of a file server that restarts."""
    open_weights, path = WEIGHTS[name]
    expected, calls, readv = arrays(open_weights(path)), 0, os.readv

    def stale(number: int, buffers: Iterable[memoryview]) -> int:
        nonlocal calls
        calls += 1
        if calls % 2 or not retry.PAUSES:
            raise OSError(errno.ESTALE, os.strerror(errno.ESTALE))
        return readv(number, buffers)

    monkeypatch.setattr(os, "readv", stale)
    monkeypatch.setattr(retry, "PAUSES", (0,))
    assert equal(arrays(open_weights(path)), expected) and calls > 2
    monkeypatch.setattr(retry, "PAUSES", ())
    with pytest.raises(Failure, match=r"cannot be read now \(Stale file handle\); run the same"):
        arrays(open_weights(path))
