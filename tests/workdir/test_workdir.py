"""The files of a run folder: replaced as a whole, locked, and read without their middle."""

import contextlib
import errno
import fcntl
import os
import resource
import threading
import tracemalloc
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests.command import TINY
from tests.data.open_files import no_more_files
from vmoe.config import load
from vmoe.errors import Failure
from vmoe.train.folder import open_workdir
from vmoe.train.report import Report
from vmoe.train.sinks import CsvFile, Entry, TensorBoard
from vmoe.workdir.layout import replace_text, steps_of
from vmoe.workdir.lock import LOCK, lock_workdir


def test_two_writers_of_one_file_leave_the_whole_text_of_one_and_nothing_else(
    tmp_path: Path,
) -> None:
    texts, errors = ["a" * 10_000, "b" * 10_000], []

    def write(text: str) -> None:
        try:
            for _ in range(100):
                replace_text(tmp_path / "file", text)
        except OSError as error:
            errors.append(error)

    threads = [threading.Thread(target=write, args=(text,)) for text in texts]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not errors and (tmp_path / "file").read_text() in texts
    assert list(tmp_path.iterdir()) == [tmp_path / "file"]


def test_a_text_is_on_the_disk_before_it_takes_its_name(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    synced, fsync = list[tuple[int, bool]](), os.fsync

    def noted(number: int) -> None:
        synced.append((os.fstat(number).st_size, (tmp_path / "file").exists()))
        fsync(number)

    monkeypatch.setattr(os, "fsync", noted)
    replace_text(tmp_path / "file", "text")
    assert synced == [(4, False)]


def test_a_file_that_cannot_be_replaced_is_named_and_kept(tmp_path: Path) -> None:
    (tmp_path / "folder").mkdir()
    with pytest.raises(OSError) as caught:
        replace_text(tmp_path / "folder", "text")
    assert caught.value.filename == str(tmp_path / "folder")
    assert list(tmp_path.rglob("*")) == [tmp_path / "folder"]


def test_resuming_keeps_no_more_in_memory_than_twice_the_file(tmp_path: Path) -> None:
    writer = CsvFile(tmp_path / "experts.csv")
    row = {"block": 1, "expert": 2, "load": 0.123456, "importance": 0.123456}
    for step in range(1, 6):
        writer.append(step, [row] * 4_000)
    position = writer.position()
    tracemalloc.start()
    again = CsvFile(tmp_path / "experts.csv")
    assert again.restore(5, position) == "" and again.last_step == again.stored_step() == 5
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 3 * position.size
    again.append(6, [row])  # the columns are known


def test_rows_that_are_set_aside_replace_no_others(tmp_path: Path) -> None:
    names = []
    for rows in (2, 1, 3):  # the second run stops earlier, the third later
        writer = CsvFile(tmp_path / "metrics.csv")
        for step in range(1, rows + 1):
            writer.append(step, [{"loss": 0.5}])
        names.append(writer.set_aside())
    assert names == ["metrics.csv.old", "metrics.csv.old.2", "metrics.csv.old.3"]
    assert [(tmp_path / name).read_text().count("\n") for name in names] == [3, 2, 4]
    assert writer.set_aside() == ""


def test_steps_and_rows_that_cannot_be_read_for_a_moment_are_read_again(tmp_path: Path) -> None:
    (tmp_path / "checkpoints" / "20").mkdir(parents=True)
    with no_more_files(until_retry=True):
        assert steps_of(tmp_path) == [20]
    writer = CsvFile(tmp_path / "metrics.csv")
    writer.append(7, [{"loss": 0.5}])
    position = writer.position()
    with no_more_files(until_retry=True):
        assert writer.stored_step() == 7
    with no_more_files(until_retry=True):
        assert writer.restore(7, position) == ""


def test_a_device_in_the_place_of_rows_is_not_read(tmp_path: Path) -> None:
    """Reading a device or a pipe may never end."""
    writer = CsvFile(tmp_path / "metrics.csv")
    writer.append(7, [{"loss": 0.5}])
    position = writer.position()
    (tmp_path / "metrics.csv").unlink()
    (tmp_path / "metrics.csv").symlink_to("/dev/null")
    for read in (
        writer.stored_step,
        lambda: writer.has(position),
        lambda: writer.restore(7, position),
    ):
        with pytest.raises(Failure, match="metrics.csv: cannot be read .not a regular file.; rest"):
            read()


def test_a_full_disk_is_no_wrong_input_when_a_run_begins(tmp_path: Path) -> None:
    """A limit on the file size is like a full disk."""
    config = load(TINY)
    with no_room(), pytest.raises(Failure, match=f"^workdir {tmp_path}: File too large"):
        lock_workdir(tmp_path).__enter__()
    with no_room(), pytest.raises(Failure, match=f"^{tmp_path}: cannot be written .File too large"):
        open_workdir(tmp_path, config, ("a", "b"), {}, None)


def test_a_file_that_cannot_be_written_is_a_full_disk_only_where_the_disk_is_full(
    tmp_path: Path,
) -> None:
    resume = "run the same command to resume from the newest checkpoint"
    (tmp_path / "metrics.csv").symlink_to(tmp_path / "moved" / "metrics.csv")
    (tmp_path / "tensorboard").touch()
    with pytest.raises(Failure, match=rf"No such file.*; put its folder back, and {resume}$"):
        CsvFile(tmp_path / "metrics.csv").append(5, [{"loss": 0.5}])
    with pytest.raises(Failure, match=rf"File exists.*; move what is there away, and {resume}$"):
        TensorBoard(tmp_path / "tensorboard").resume(5)
    (tmp_path / "full").symlink_to("/dev/full")
    with pytest.raises(Failure, match=rf"No space left.*; free some space and {resume}$"):
        CsvFile(tmp_path / "full").append(5, [{"loss": 0.5}])


@pytest.mark.parametrize("make", [Path.touch, lambda path: path.symlink_to("gone")])
def test_checkpoints_that_are_no_folder_are_not_taken_for_none(
    tmp_path: Path, make: Callable[[Path], None]
) -> None:
    assert steps_of(tmp_path) == []
    make(tmp_path / "checkpoints")
    with pytest.raises(Failure, match=r"checkpoints: cannot be read .*; restore it, or move it aw"):
        steps_of(tmp_path)


def test_probes_whose_events_cannot_be_written_are_repeated(tmp_path: Path) -> None:
    """A row of the CSV file would say that they are done."""
    entry = Entry(rows={"fewshot.csv": [{"shots": 5}]}, scalars={"fewshot_raw/mean/5": 0.5})
    with Report(tmp_path, load(TINY)) as report:
        report.resume(0, {})
        with no_room(), pytest.raises(Failure, match="tensorboard: cannot be written .File too"):
            report.write(20, entry)
        assert not report.has("fewshot.csv", 20) and not (tmp_path / "fewshot.csv").exists()
        report.write(20, entry)
        assert report.has("fewshot.csv", 20) and not report.has("fewshot.csv", 21)


@contextlib.contextmanager
def no_room() -> Iterator[None]:
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (0, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def test_where_the_file_system_has_no_locks_a_run_warns_and_begins(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def flock(*arguments: object) -> None:
        raise OSError(errno.ENOSYS, "Function not implemented")

    monkeypatch.setattr(fcntl, "flock", flock)  # as on Lustre without -o flock
    with lock_workdir(tmp_path / "run"):
        line = capsys.readouterr().err
    assert line == (
        f"{tmp_path / 'run' / LOCK}: cannot be locked (Function not implemented); make sure that "
        "no other run uses this workdir\n"
    )
