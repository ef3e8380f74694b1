"""Signals to the real command before and after it locks the run folder; consoles that close."""

import datetime
import io
import os
import pty
import shutil
import signal
import socket
import sys
import threading
from pathlib import Path

import pytest

from tests.command import TINY, interpreter, start
from vmoe.host.signals import Signals, unfinished
from vmoe.train.console import RunConsole
from vmoe.workdir.layout import steps_of

SLOW_RECIPE = f"""
import sys, time
from pathlib import Path
from vmoe.config import load

print("reading the recipe", file=sys.stderr, flush=True)
time.sleep(60)
config = load(Path({TINY!r}))
"""


@pytest.mark.process
@pytest.mark.parametrize(
    ("arguments", "number"),
    [
        (["train", "--workdir", "run"], signal.SIGINT),
        (["train", "--workdir", "run"], signal.SIGTERM),
        (["train", "--dry-run"], signal.SIGHUP),
        (["plan", "--devices", "8"], signal.SIGINT),
    ],
)
def test_a_signal_before_the_run_folder_is_locked_ends_the_command_at_once_and_leaves_nothing(
    arguments: list[str], number: signal.Signals, tmp_path: Path
) -> None:
    (tmp_path / "slow.py").write_text(SLOW_RECIPE)
    temporary = {"TMPDIR": str(tmp_path)}
    arguments = [*arguments, "--config", "slow.py"]
    with start(*arguments, cwd=tmp_path, environment=temporary) as process:
        process.wait_until(lambda: "reading the recipe\n" in process.stderr)
        process.send_signal(number)
        assert process.wait() == 128 + number
        assert process.stderr.endswith(f"\nvmoe: interrupted by {number.name}\n")
    assert [path.name for path in tmp_path.iterdir()] == ["slow.py"]


@pytest.mark.process
def test_a_signal_after_the_run_folder_is_locked_is_noted_until_the_first_step(
    tmp_path: Path,
) -> None:
    workdir = tmp_path / "run"
    with start("train", "--config", TINY, "--workdir", workdir) as process:
        process.wait_until(lambda: "px, read by 1 thread; " in process.stderr)
        process.send_signal(signal.SIGHUP)
        assert process.wait() == 75
        last = process.stderr.splitlines()[-1]
    assert last == "vmoe: SIGHUP: stopped before the first step; run the same command to start"
    assert (workdir / "config.json").exists() and not steps_of(workdir)


@pytest.mark.process
@pytest.mark.parametrize("command", ["predict", "evaluate"])
def test_a_signal_ends_a_command_that_waits_for_a_file(
    command: str, tiny_run: Path, tmp_path: Path
) -> None:
    pipe = tmp_path / "routing.json"
    os.mkfifo(pipe)
    images = [tmp_path / "image.png"] if command == "predict" else []
    for image in images:
        image.touch()
    arguments = ("--checkpoint", tiny_run, "--routing-file", pipe, *images)
    with start(command, *arguments) as process, pipe.open("wb"):
        # the pipe is open, so the command has opened it, too
        process.send_signal(signal.SIGTERM)
        assert process.wait() == 128 + signal.SIGTERM


@pytest.mark.process
def test_a_signal_ends_a_process_that_waits_for_the_others(tmp_path: Path) -> None:
    arguments = ("train", "--config", TINY, "--workdir", tmp_path / "run", "--distributed")
    with socket.create_server(("127.0.0.1", 0)) as first:
        cluster = {
            "JAX_COORDINATOR_ADDRESS": f"127.0.0.1:{first.getsockname()[1]}",
            "JAX_NUM_PROCESSES": "2",
            "JAX_PROCESS_ID": "1",
        }
        with start(*arguments, environment=cluster) as process, first.accept()[0]:
            # the first process has taken the connection and will not answer
            process.send_signal(signal.SIGINT)
            assert process.wait() == 128 + signal.SIGINT
    assert not (tmp_path / "run").exists()


def test_sighup_stays_ignored_where_it_was_when_the_process_started() -> None:
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)  # as nohup does
    try:
        with Signals() as signals:
            signal.raise_signal(signal.SIGHUP)
        assert not signals.requested and signal.getsignal(signal.SIGHUP) == signal.SIG_IGN
    finally:
        signal.signal(signal.SIGHUP, before)


TRAIN = ("train", "--config", TINY, "--steps", "60")  # the program of tiny_run, compiled once


def lost_pipe() -> int:
    """A closed pipe, as after ``| head``."""
    reader, writer = os.pipe()
    os.close(reader)
    return writer


def assert_recorded(workdir: Path, reason: str) -> None:
    date, _, line = (workdir / "console.txt").read_text().partition(" ")
    assert line == f"stderr cannot be written ({reason}): messages are dropped\n"
    assert datetime.datetime.fromisoformat(date).tzinfo


@pytest.mark.process
def test_a_run_whose_terminal_is_closed_trains_to_its_end_and_records_when_and_why(
    tmp_path: Path,
) -> None:
    workdir = tmp_path / "run"
    reader, writer = pty.openpty()
    with start(*TRAIN, "--workdir", workdir, "--log-every", "10", output=writer) as process:
        process.wait_until((workdir / "metrics.csv").exists)
        os.close(reader)
        assert process.wait() == 0
    assert steps_of(workdir) == [60]
    assert_recorded(workdir, "Input/output error")


@pytest.mark.process
def test_a_finished_run_whose_messages_nobody_reads_succeeds_and_records_when_and_why(
    tiny_run: Path, tmp_path: Path
) -> None:
    workdir = tmp_path / "run"
    shutil.copytree(tiny_run, workdir)
    with start(*TRAIN, "--workdir", workdir, output=lost_pipe()) as process:
        assert process.wait() == 0
    assert_recorded(workdir, "Broken pipe")


def test_messages_that_a_full_disk_refuses_are_dropped_and_the_run_records_when_and_why(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with open("/dev/full", "wb", buffering=0) as disk:
        monkeypatch.setattr(sys, "stderr", io.TextIOWrapper(disk, write_through=True))
        with RunConsole(60, tmp_path) as console:
            console.log("a message")
        monkeypatch.undo()
    assert_recorded(tmp_path, "No space left on device")


@pytest.mark.process
def test_files_are_written_although_the_reader_of_stdout_is_gone(
    tiny_run: Path, tmp_path: Path
) -> None:
    files = ("--predictions", tmp_path / "images.csv", "--csv", tmp_path / "rows.csv")
    buffered = {"PYTHONUNBUFFERED": ""}  # stdout is written when it is flushed
    arguments = ("evaluate", "--checkpoint", tiny_run, *files)
    with start(*arguments, environment=buffered, output=lost_pipe()) as process:
        assert process.wait() == 141
    lines = {path.name: len(path.read_text().splitlines()) for path in tmp_path.iterdir()}
    assert lines == {"images.csv": 361, "rows.csv": 2}


@pytest.mark.process
def test_a_run_without_stdout_and_stderr_trains_to_its_end(tmp_path: Path) -> None:
    closed = ("sh", "-c", 'exec "$0" "$@" >&- 2>&-')
    result = interpreter(*TRAIN, "--workdir", tmp_path / "run", under=closed)
    assert result.returncode == 0 and steps_of(tmp_path / "run") == [60]
    assert "(Bad file descriptor)" in (tmp_path / "run" / "console.txt").read_text()


@pytest.mark.process
def test_a_command_whose_stdout_is_closed_prints_nowhere_and_succeeds() -> None:
    result = interpreter("models", "vit_test", under=("sh", "-c", 'exec "$0" "$@" >&-'))
    assert (result.returncode, result.stderr) == (0, "")


def test_signals_are_noted_while_the_context_is_active_and_handlers_are_restored() -> None:
    before = [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)]
    threads = threading.active_count()
    with Signals() as signals:
        assert not signals.requested
        signal.raise_signal(signal.SIGTERM)
        assert signals.requested == "SIGTERM"
    assert [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)] == before
    assert signal.set_wakeup_fd(-1) == -1 and threading.active_count() == threads


def test_an_error_is_not_hidden_by_an_error_of_removing_an_unfinished_file() -> None:
    with pytest.raises(ValueError, match="the first"), unfinished(Path("x" * 1000)):
        raise ValueError("the first")
