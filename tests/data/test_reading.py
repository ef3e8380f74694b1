"""Reading ahead, in threads and in worker processes that die, hang or outlive their parent."""

import dataclasses
import functools
import gc
import multiprocessing
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from tests.command import TIMEOUT, alive
from tests.data.numbered import Failing, Halves, Numbers, blocked_after_failing
from vmoe.config import DataConfig, TrainConfig, ViTConfig
from vmoe.config.preprocessing import Preprocessing
from vmoe.data.pipeline import (
    evaluation_batches,
    evaluation_order,
    start_workers,
    training_batches,
)
from vmoe.data.reading import Reading, read_ahead
from vmoe.data.sources import open_source
from vmoe.data.workers import MOST_WORKERS, WorkerDied, Workers, count_workers
from vmoe.errors import UsageError
from vmoe.evaluate.predict import Files
from vmoe.host.cores import usable_cores

ROOT = Path(__file__).parents[2]


class Ended(Exception):
    """Ends a wait."""


def wait_for_end(pid: int) -> None:
    deadline = time.monotonic() + TIMEOUT
    while alive(pid):
        assert time.monotonic() < deadline, "the process is still there"
        time.sleep(0.01)


@pytest.mark.process
@pytest.mark.parametrize("count", [0, 1, 3])
def test_batches_come_in_order_whoever_reads_them(count: int) -> None:
    before = os.environ.get("JAX_PLATFORMS")
    with Workers(count) as workers:
        with read_ahead(Numbers(), 5, 20, workers) as reader:
            batches = list(reader)
        with read_ahead(Numbers(), 0, 0, workers) as reader:
            assert not list(reader)
    for number, batch in enumerate(batches, 5):
        np.testing.assert_array_equal(
            batch["array"], np.full((number % 3 + 1, 1000), number, np.int32)
        )
        np.testing.assert_array_equal(batch["flags"], Numbers()[number]["flags"])
    pids = {batch["pid"] for batch in batches}
    assert len(pids) == max(count, 1) and (os.getpid() in pids) == (count == 0)
    assert {batch["jax"] for batch in batches} == ({"cpu"} if count else {before})
    assert os.environ.get("JAX_PLATFORMS") == before
    assert not any(alive(pid) for pid in pids - {os.getpid()})


@pytest.mark.process
@pytest.mark.parametrize("count", [0, 2])
def test_a_batch_that_is_read_in_parts_has_the_images_that_are_read_one_by_one(count: int) -> None:
    """Also in a shard, and in the last batch of an evaluation, which has padding."""
    train = open_source("digits", "train")
    config = TrainConfig(model=ViTConfig(patch_size=32, image_size=224), batch_size=130)
    shard = training_batches(train, config, shard=(1, 2))
    assert shard.parts == 2
    with Workers(count) as workers:
        with read_ahead(shard, 3, 2, workers) as reader:
            read = list(reader)
        for number, (batch, _, _) in enumerate(read, 3):
            for i in range(65):
                image = shard.images[(2 * number + 1) * 65 + i]
                np.testing.assert_array_equal(batch.images[i], image.pixels)
                assert batch.labels[i] == image.labels and batch.valid[i]
        last = [*evaluation_batches(train, Preprocessing(224), Reading(700, workers))][-1]
    order = evaluation_order(len(train))[700:]
    np.testing.assert_array_equal(last.labels[:557, 0], [train.labels_of(i)[0] for i in order])
    assert last.valid.tolist() == [True] * 557 + [False] * 143 and not last.images[557:].any()


@pytest.mark.process
def test_a_worker_reads_the_batches_that_the_steps_define() -> None:
    """The oracle reads in this process. The shared memory grows with the batches."""
    model = ViTConfig(patch_size=2, image_size=8, num_classes=10)
    data = DataConfig(rotate=10.0, shift=1, erasing=0.5, crop_min_area=0.3)
    config = TrainConfig(model=model, data=data, seed=3)
    train, validation = (open_source("digits", split) for split in ("train", "validation"))
    batches = training_batches(train, config)
    size, reading = Preprocessing(16), Reading(100)
    with Workers(1) as workers:
        with read_ahead(batches, 40, 3, workers) as reader:
            ours = [read.batch for read in reader]
        together = dataclasses.replace(reading, workers=workers)
        ours += evaluation_batches(validation, size, together)
    oracle = [batches[i].batch for i in (40, 41, 42)] + [
        *evaluation_batches(validation, size, reading)
    ]
    for one, other in zip(ours, oracle, strict=True):
        for x, y in zip(one, other, strict=True):
            np.testing.assert_array_equal(x, y)
            assert x.dtype == y.dtype


@pytest.mark.process
@pytest.mark.parametrize("count", [0, 1])
def test_an_error_is_raised_in_its_place(count: int) -> None:
    for how, kind, message in [
        ("error", UsageError, "photos/3.png: cannot be read"),
        ("connection", ConnectionResetError, "the server of the data is gone"),
    ]:
        with Workers(count) as workers, read_ahead(Failing(how), 0, 5, workers) as reader:
            assert [next(reader), next(reader)] == [0, 1]
            with pytest.raises(kind) as caught:
                next(reader)
            assert str(caught.value) == message
    with Workers(2 * count) as workers, read_ahead(Halves(), 0, 5, workers) as reader:
        assert [next(reader), next(reader)] == [[0, 1], [2, 3]]
        with pytest.raises(UsageError, match="photos/4.png"):
            next(reader)


@pytest.mark.process
@pytest.mark.parametrize(
    ("how", "line"),
    [
        ("killed", "data worker 1 of 1 was killed by SIGKILL, perhaps because the machine is out"),
        ("exit", "data worker 1 of 1 ended with status 3; its error is above"),
    ],
)
def test_a_worker_that_dies_is_an_error_with_its_name_and_a_remedy(how: str, line: str) -> None:
    gc.freeze()  # so that only objects of this test are collected
    with Workers(1) as workers, read_ahead(Failing(how), 0, 5, workers) as reader:
        assert [next(reader), next(reader)] == [0, 1]
        with pytest.raises(WorkerDied) as caught:
            next(reader)
    message = str(caught.value)
    assert message.startswith(line) and ("use fewer workers" in message) == (how == "killed")
    assert "\n" not in message
    del caught, workers, reader
    gc.collect()  # prints no error, which pytest would raise
    gc.unfreeze()


@pytest.mark.process
@pytest.mark.parametrize("count", [0, 1])
def test_a_wait_for_a_source_that_hangs_can_be_ended(count: int) -> None:
    batches: list[int] = []

    def on_wait(seconds: int) -> None:
        if len(batches) == 2:
            raise Ended(f"waited for {seconds} s")

    with (
        Workers(count) as workers,
        read_ahead(Failing("hang"), 0, 5, workers, on_wait=on_wait) as reader,
        pytest.raises(Ended, match=r"waited for \d+ s"),
    ):
        for batch in reader:
            batches.append(batch)
    assert batches == [0, 1]


SCRIPT = """
import os, signal, sys, time
from tests.data.numbered import Failing, Numbers
from vmoe.data.reading import read_ahead
from vmoe.data.workers import Workers

def end(seconds):
    raise TimeoutError

if __name__ == "__main__":
    workers = Workers(int(sys.argv[2]))
    with read_ahead(Numbers(), 0, 1, workers, on_wait=lambda seconds: None) as reader:
        print(next(reader)["pid"], flush=True)
    if sys.argv[1] == "idle":
        os.kill(os.getpid(), signal.SIGKILL)
    try:
        list(read_ahead(Failing("hang"), 0, 5, workers, on_wait=end))
    except TimeoutError:
        print("ended", flush=True)
    if sys.argv[1] == "reading":
        os.kill(os.getpid(), signal.SIGKILL)
"""


@pytest.mark.process
@pytest.mark.parametrize(
    ("state", "count"), [("idle", 1), ("reading", 1), ("not closed", 1), ("not closed", 0)]
)
def test_no_process_is_left_behind_and_none_keeps_another_from_ending(
    state: str, count: int, tmp_path: Path
) -> None:
    """A process is killed, or ends without closing its reader while a read hangs."""
    script = tmp_path / "script.py"
    script.write_text(SCRIPT)
    run = subprocess.run(
        [sys.executable, script, state, str(count)],
        capture_output=True,
        text=True,
        timeout=TIMEOUT,
        env=os.environ | {"PYTHONPATH": str(ROOT)},
    )
    assert run.returncode == (0 if state == "not closed" else -signal.SIGKILL), run.stderr
    assert not run.stderr and ("ended" in run.stdout) == (state != "idle")
    wait_for_end(int(run.stdout.split()[0]))


@pytest.mark.process
def test_a_signal_that_stops_the_run_does_not_end_a_worker() -> None:
    with Workers(1) as workers, read_ahead(Numbers(), 0, 60, workers) as reader:
        pid = next(reader)["pid"]
        for number in (signal.SIGTERM, signal.SIGINT):
            os.kill(pid, number)
        assert {batch["pid"] for batch in reader} == {pid}


def test_tiny_images_in_memory_are_read_in_one_thread_and_others_in_two() -> None:
    """Reading a tiny array holds Python's lock: on two idle cores, two threads take longer."""
    digits, files = open_source("digits", "train"), open_source("synthetic:20:8:2", "train")
    for source, size, threads in ((digits, 8, 1), (digits, 96, 2), (files, 8, 2)):
        reading = start_workers(0, source, 20, Preprocessing(size))
        assert str(reading) == f"{threads} thread{'s' * (threads > 1)}", (source.name, size)
        assert len(reading.readers(Numbers())) == threads


@pytest.mark.process
def test_signals_are_not_blocked_where_workers_could_not_be_started() -> None:
    context = multiprocessing.get_context("spawn")
    ours, theirs = context.Pipe()
    process = context.Process(target=blocked_after_failing, args=(theirs,), daemon=True)
    process.start()
    theirs.close()
    assert ours.recv() == set()
    process.join()


def test_shared_memory_that_is_too_small_is_named() -> None:
    if not os.path.isdir("/dev/shm"):
        pytest.skip("this system does not show its shared memory")
    source = open_source("digits", "test")
    assert count_workers(2, source, 9, 1 << 20) == 2
    assert count_workers(0, source, 9, 1 << 60) == 0
    with pytest.raises(UsageError, match=r"num_workers=2: they need .* /dev/shm has .* MiB free"):
        count_workers(2, source, 9, 1 << 60)


def test_workers_are_one_fewer_than_the_cores_where_threads_are_not_as_fast(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """This machine may have any number of cores, so it is set here."""
    if not os.path.isdir("/dev/shm"):
        pytest.skip("this system does not show its shared memory")
    pixels = open_source("digits", "train")
    Image.new("RGB", (9, 9)).save(tmp_path / "0.png")
    files = Files((str(tmp_path / "0.png"),))

    def count(
        cores: int,
        images: int = 1_000,
        part: int = 1 << 10,
        share: tuple[int, int] | None = None,
    ) -> list[int]:
        monkeypatch.setattr("vmoe.data.workers.usable_cores", lambda: cores)
        counts = functools.partial(count_workers, share=share)
        return [counts(None, source, images, part) for source in (files, pixels)]

    assert [count(n) for n in (1, 2, 3, 16, 200)] == [[0, 0], [0, 0], [2, 0], [15, 0], [32, 0]]
    assert MOST_WORKERS == 32 and count(16, 999) == [0, 0]
    assert count(16, share=(4, 4)) == [3, 0] and count(16, share=(8, 2)) == [0, 0]
    assert count(16, part=1 << 60) == [0, 0]  # nothing of that size fits the shared memory


def test_a_limit_of_a_containers_time_is_a_number_of_cores(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr("vmoe.host.cores.cores", lambda: 6)
    monkeypatch.setattr("vmoe.host.cores.QUOTA", tmp_path / "cpu.max")
    assert usable_cores() == 6  # no such file
    for text, count in {"max": 6, "200000": 2, "250000": 2, "50000": 1, "900000": 6}.items():
        (tmp_path / "cpu.max").write_text(f"{text} 100000\n")
        assert usable_cores() == count, text


@pytest.mark.process
def test_workers_need_no_guard_in_a_script(tmp_path: Path) -> None:
    """Python's own processes would run the script again."""
    script = tmp_path / "script.py"
    script.write_text(
        "from vmoe.data.pipeline import evaluation_batches, start_workers\n"
        "from vmoe.config.preprocessing import Preprocessing\n"
        "from vmoe.data.reading import Reading\n"
        "from vmoe.data.sources import open_source\n"
        "source, how = open_source('digits', 'test'), Preprocessing(8)\n"
        "with start_workers(2, source, 100, how) as workers:\n"
        "    batches = evaluation_batches(source, how, Reading(100, workers))\n"
        "    print(workers, sum(int(batch.valid.sum()) for batch in batches))\n"
    )
    done = subprocess.run([sys.executable, script], capture_output=True, text=True, cwd=ROOT)
    assert done.stdout == "2 workers 360\n", done.stderr
