"""Signals to the real command before and after it locks the run folder."""

import os
import signal
import socket
import threading
from pathlib import Path

import pytest

from tests.command import TINY, start
from vmoe.signals import Signals
from vmoe.workdir.layout import steps_of

SLOW_RECIPE = f"""
import sys, time
from pathlib import Path
from vmoe.config import load

print("reading the recipe", file=sys.stderr, flush=True)
time.sleep(60)
config = load(Path({TINY!r}))
"""


@pytest.mark.parametrize(
    ("command", "number"),
    [("train", signal.SIGINT), ("train", signal.SIGTERM), ("plan", signal.SIGINT)],
)
def test_a_signal_before_the_run_folder_is_locked_ends_the_command_at_once(
    command: str, number: signal.Signals, tmp_path: Path
) -> None:
    (tmp_path / "slow.py").write_text(SLOW_RECIPE)
    workdir = tmp_path / "run"
    place = ["--workdir", workdir] if command == "train" else ["--devices", "8"]
    with start(command, "--config", tmp_path / "slow.py", *place) as process:
        process.wait_until(lambda: "reading the recipe\n" in process.stderr)
        process.send_signal(number)
        assert process.wait(timeout=10) == 128 + number
        assert process.stderr.endswith(f"\nvmoe: interrupted by {number.name}\n")
    assert not workdir.exists()


def test_a_signal_after_the_run_folder_is_locked_is_noted_until_the_first_step(
    tmp_path: Path,
) -> None:
    workdir = tmp_path / "run"
    with start("train", "--config", TINY, "--workdir", workdir) as process:
        process.wait_until(lambda: "1,257 images of 10 classes" in process.stderr)
        process.send_signal(signal.SIGINT)
        assert process.wait() == 75
        last = process.stderr.splitlines()[-1]
    assert last == "vmoe: SIGINT: stopped before the first step; run the same command to start"
    assert (workdir / "config.json").exists() and not steps_of(workdir)


@pytest.mark.parametrize("command", ["predict", "evaluate"])
def test_a_signal_ends_a_command_that_waits_for_a_file(
    command: str, tiny_run: Path, tmp_path: Path
) -> None:
    pipe = tmp_path / "image.png"
    os.mkfifo(pipe)
    data = [pipe] if command == "predict" else ["--data", f"arrays:{pipe}"]
    with start(command, "--checkpoint", tiny_run, *data) as process, pipe.open("wb"):
        # the pipe is open, so the command has opened it, too
        process.send_signal(signal.SIGTERM)
        assert process.wait(timeout=10) == 128 + signal.SIGTERM


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
            assert process.wait(timeout=10) == 128 + signal.SIGINT
    assert not (tmp_path / "run").exists()


def test_signals_are_noted_while_the_context_is_active_and_handlers_are_restored() -> None:
    before = [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)]
    threads = threading.active_count()
    with Signals() as signals:
        assert not signals.requested
        signal.raise_signal(signal.SIGTERM)
        assert signals.requested == "SIGTERM"
    assert [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)] == before
    assert signal.set_wakeup_fd(-1) == -1 and threading.active_count() == threads
