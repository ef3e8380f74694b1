"""Stop and resume a run: kills, signals, corruption, a full disk, a second run, NaN."""

import contextlib
import csv
import functools
import gc
import json
import os
import shutil
import signal
import socket
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest

from tests.command import ROOT, forked, start, vmoe
from tests.hostility.kill import Killed, evaluating, kill_once, log_of, saving, training
from tests.run_folder import Poisoned, assert_same, differences, last_step, rows
from vmoe import config as configs
from vmoe.checkpoints.run import Checkpoints, Restored
from vmoe.config import EvalConfig, FewShotConfig, TrainConfig
from vmoe.errors import Failure, Stopped, UsageError
from vmoe.mesh import place
from vmoe.train import evaluations, train
from vmoe.train.report import Report
from vmoe.train.sinks import Sink
from vmoe.train.step import make_train_step
from vmoe.workdir.layout import steps_of

pytestmark = pytest.mark.process

STEPS = 40
RECIPE = f"""
from pathlib import Path
from vmoe.config import EvalConfig, FewShotConfig, load, replace

config = replace(
    load(Path({str(ROOT / "configs" / "tiny.py")!r})), steps={STEPS}, log_every=5, ema_decay=0.9,
    evaluate_every=20, checkpoint_every=10, keep_latest=10,
    model=dict(
        depth=1, sparse_blocks=(0,), dropout=0.1,
        moe=dict(experts=dict(dropout=0.1), router=dict(priority="random")),
    ),
    evaluations=(EvalConfig(), EvalConfig("again")), fewshot=FewShotConfig(("digits",), every=20),
)
"""


@pytest.fixture(scope="module")
def recipe(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Every source of randomness in a single block, since tracing dominates so short a run."""
    path = tmp_path_factory.mktemp("recipe") / "recipe.py"
    path.write_text(RECIPE)
    return path


@pytest.fixture(scope="module")
def config(recipe: Path) -> TrainConfig:
    return configs.load(recipe)


@pytest.fixture(scope="module")
def uninterrupted(recipe: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An uninterrupted run of the same command."""
    workdir = tmp_path_factory.mktemp("whole") / "run"
    stderr, status = run(recipe, workdir)
    assert status == 0, stderr
    return workdir


def run(recipe: Path, workdir: Path) -> tuple[str, int]:
    """Runs the command; returns its stderr and its exit status."""
    result = vmoe("train", "--config", recipe, "--workdir", workdir)
    return result.stderr, result.returncode


def test_a_run_killed_in_every_phase_is_bitwise_equal_to_an_uninterrupted_one(
    recipe: Path, uninterrupted: Path, tmp_path: Path
) -> None:
    workdir = tmp_path / "run"

    def kill(phase: Callable[[Path, int], bool], step: int, workers: int = 0) -> Killed:
        reading = ("--data.num-workers", str(workers))
        line = ("train", "--config", recipe, "--workdir", workdir, *reading)
        with start(*line, log=log_of(workdir, 0)) as process:
            return kill_once([process], workdir, phase, step, 0.5)

    assert kill(training, 5, workers=1).step >= 5
    assert kill(saving, 15).unfinished_checkpoint
    assert kill(evaluating, 25).unfinished_evaluation
    stderr, status = run(recipe, workdir)
    assert status == 0 and "resumed from step" in stderr and "corrupt" not in stderr, stderr
    assert not differences(uninterrupted, workdir, STEPS)


@pytest.mark.parametrize("name", ["evaluations", "fewshot"])
@pytest.mark.parametrize("step", [20, STEPS])
def test_an_evaluation_is_repeated_if_a_row_has_changed_that_no_checkpoint_covers(
    step: int, name: str, uninterrupted: Path, config: TrainConfig, tmp_path: Path
) -> None:
    """The rows of an evaluation are written after the checkpoint of its step."""
    workdir = tmp_path / "run"
    shutil.copytree(uninterrupted, workdir)
    for later in (each for each in steps_of(workdir) if each > step):
        shutil.rmtree(workdir / "checkpoints" / str(later))
    path = workdir / f"{name}.csv"
    content = bytearray(path.read_bytes())
    content[content.rindex(b",0.") + 3 if step == STEPS else 5] ^= 1  # a digit, or the header
    path.write_bytes(content)
    train(config, workdir)
    assert_same(workdir, uninterrupted)


@pytest.fixture(scope="module")
def stopped_twice(
    recipe: Path, tmp_path_factory: pytest.TempPathFactory
) -> tuple[Path, list[tuple[str, int]]]:
    """A run stopped one step before a row is due, then while it evaluates for the second time.

    Its folder, and stderr and exit status of the three commands.
    """
    workdir, calls = tmp_path_factory.mktemp("stopped") / "run", 0

    def evaluate(*arguments: object, **settings: object) -> object:
        nonlocal calls
        calls += 1
        if calls == 6:  # of the second evaluated step
            signal.raise_signal(signal.SIGTERM)
        return real(*arguments, **settings)

    real = evaluations.evaluate
    with signal_at_step(9):
        commands = [run(recipe, workdir)]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(evaluations, "evaluate", evaluate)
        commands.append(run(recipe, workdir))
    assert {row["step"] for row in rows(workdir, "evaluations")} == {"20"}
    return workdir, [*commands, run(recipe, workdir)]


@contextlib.contextmanager
def signal_at_step(number: int) -> Iterator[None]:
    """Raises SIGINT when a run first reports this step."""
    real, raised = Report.step, []

    def step(self: Report, now: int) -> None:
        if now == number and not raised:
            raised.append(signal.raise_signal(signal.SIGINT))
        real(self, now)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Report, "step", step)
        yield


def test_a_signal_saves_and_exits_with_75_and_the_same_command_resumes(
    stopped_twice: tuple[Path, list[tuple[str, int]]],
) -> None:
    first, second, (stderr, status) = stopped_twice[1]
    for (text, stopped), name, step in ((first, "SIGINT", 9), (second, "SIGTERM", STEPS)):
        last = f"vmoe: {name}: checkpoint saved at step {step} of {STEPS}; run the same command to"
        assert stopped == 75 and text.splitlines()[-1].startswith(last)
    assert f"resumed from step 9 of {STEPS}" in second[0]
    assert f"already complete ({STEPS} of {STEPS} steps)" in stderr and status == 0


def test_a_signal_aborts_an_evaluation_and_a_resumed_run_repeats_it(
    stopped_twice: tuple[Path, list[tuple[str, int]]], uninterrupted: Path
) -> None:
    assert_same(stopped_twice[0], uninterrupted)


def test_the_rate_is_left_out_of_a_row_right_after_the_step_that_compiles(
    stopped_twice: tuple[Path, list[tuple[str, int]]],
) -> None:
    table = csv.DictReader((stopped_twice[0] / "metrics.csv").read_text().splitlines())
    rates = {row["step"]: row["images_per_second"] for row in table}
    assert rates["10"] == "" and float(rates["5"]) > 0 and float(rates["15"]) > 0


def test_a_second_run_is_refused_and_a_second_signal_exits_at_once_with_the_checkpoint_intact(
    recipe: Path, config: TrainConfig, uninterrupted: Path, tmp_path: Path
) -> None:
    """The process is paused while the second run is refused, and then gets its signals."""
    workdir = tmp_path / "run"
    with start("train", "--config", recipe, "--workdir", workdir) as process:
        process.wait_until(lambda: last_step(workdir) >= 15)
        process.send_signal(signal.SIGSTOP)
        holder = f"already in use by process {process.pid} on {socket.gethostname()}"
        with pytest.raises(UsageError, match=holder):
            train(config, workdir)
        process.send_signal(signal.SIGINT)
        process.send_signal(signal.SIGCONT)
        while process.poll() is None:
            process.send_signal(signal.SIGINT)
            time.sleep(0.002)
        assert process.wait() == 128 + signal.SIGINT
    with pytest.raises(UsageError, match="holds a run of another config"):  # the lock is released
        train(configs.replace(config, seed=1), workdir)
    stderr, status = run(recipe, workdir)
    assert "corrupt" not in stderr and status == 0
    assert_same(uninterrupted, workdir)


class Gone(BaseException):
    """What no handler of errors sees, as when the system kills a process."""


class FailsIn(Sink):
    """Raises an error when a set is evaluated for the n-th time."""

    def __init__(self, error: BaseException, *, evaluation: int) -> None:
        self._error, self._left = error, evaluation

    def activity(self, text: str) -> None:
        self._left -= (evaluates := text.startswith("evaluating"))
        if evaluates and not self._left:
            raise self._error


def test_no_step_is_lost_when_an_evaluation_fails_whatever_the_error(
    config: TrainConfig, uninterrupted: Path, tmp_path: Path
) -> None:
    """At step 20 a checkpoint is due, at step 5 it is not."""
    workdir = tmp_path / "run"
    with pytest.raises(Gone):
        train(config, workdir, sinks=[FailsIn(Gone(), evaluation=1)])
    assert steps_of(workdir) == [10, 20] and not rows(workdir, "evaluations")
    train(config, workdir)
    assert_same(uninterrupted, workdir)
    shutil.rmtree(workdir)
    often = configs.replace(config, evaluate_every=5)
    memory = jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: Out of memory allocating 9 bytes.")
    with pytest.raises(Failure, match="evaluations.0.batch_size=256: out of memory"):
        train(often, workdir, sinks=[FailsIn(memory, evaluation=1)])
    assert steps_of(workdir) == [5]
    smaller = configs.replace(often, evaluations=(EvalConfig(batch_size=64), EvalConfig("again")))
    with pytest.raises(Gone):
        train(smaller, workdir, sinks=[FailsIn(Gone(), evaluation=1)])


def garble(folder: Path) -> None:
    for path in folder.rglob("d/*"):
        content = bytearray(path.read_bytes())
        content[::100] = bytes(byte ^ 1 for byte in content[::100])
        path.write_bytes(content)


def truncate(folder: Path) -> None:
    for path in folder.rglob("d/*"):  # all files, since a single one may not be read
        path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def swap_parameters(folder: Path) -> None:
    """Replaces the parameters by the parameters of another step, as Orbax wrote them."""
    shutil.rmtree(folder / "params")
    shutil.copytree(folder.with_name("10") / "params", folder / "params")


def change_a_checksum(folder: Path) -> None:
    path = folder / "checksums" / "metadata"
    index = json.loads(path.read_text())
    name = next(iter(index["arrays"]))
    index["arrays"][name] = index["arrays"][name].replace("-", ".")
    path.write_text(json.dumps(index))


def replace_checksums_by_a_list(folder: Path) -> None:
    (folder / "checksums" / "metadata").write_text("[]")


CORRUPTIONS = (
    garble,
    truncate,
    swap_parameters,
    change_a_checksum,
    replace_checksums_by_a_list,
)


def test_corrupt_checkpoints_are_reported_and_the_newest_valid_one_is_used(
    uninterrupted: Path, tmp_path: Path, recipe: Path
) -> None:
    """Each newer checkpoint is corrupt in a different way; they are read and rejected in turn."""
    workdir = tmp_path / "run"
    shutil.copytree(uninterrupted, workdir)
    steps, checkpoints = range(11, 11 + len(CORRUPTIONS)), workdir / "checkpoints"
    for step, corrupt in zip(steps, CORRUPTIONS, strict=True):
        shutil.copytree(checkpoints / "20", checkpoints / str(step))
        corrupt(checkpoints / str(step))
    for step in (20, 30, STEPS):
        shutil.rmtree(checkpoints / str(step))
    stderr, status = run(recipe, workdir)
    assert status == 0, stderr
    for step in steps:
        assert f"checkpoint {step} is corrupt (" in stderr
        assert (workdir / "checkpoints" / "corrupt" / str(step)).is_dir()
    assert f"resumed from step 10 of {STEPS}" in stderr
    assert "Traceback" not in stderr
    assert_same(uninterrupted, workdir)


def test_without_a_valid_checkpoint_a_run_is_refused_and_all_files_are_kept(
    recipe: Path, uninterrupted: Path, tmp_path: Path
) -> None:
    workdir = tmp_path / "run"
    shutil.copytree(uninterrupted, workdir)
    steps = sorted(map(str, steps_of(workdir)))
    for step in steps[:-2]:
        shutil.rmtree(workdir / "checkpoints" / step)
    steps = steps[-2:]
    for step in steps:
        garble(workdir / "checkpoints" / step / "params")
    stderr, status = run(recipe, workdir)
    last = stderr.splitlines()[-1]
    assert status == 1 and last.startswith("vmoe: ") and "Traceback" not in stderr, stderr
    assert f"checkpoint {STEPS} is corrupt (" in last
    assert "every checkpoint is corrupt (moved to " in stderr
    corrupt = workdir / "checkpoints" / "corrupt"
    assert sorted(path.name for path in corrupt.iterdir()) == steps
    before = (workdir / "metrics.csv").read_text()
    stderr, status = run(recipe, workdir)
    assert status == 1 and "every checkpoint is corrupt" in stderr, "it started again"
    assert (workdir / "metrics.csv").read_text() == before


def test_a_full_disk_ends_the_run_with_one_line_and_keeps_the_last_checkpoint(
    recipe: Path, uninterrupted: Path, tmp_path: Path
) -> None:
    """A limit on the file size simulates a full disk: writing fails in the same places."""
    workdir = tmp_path / "run"
    shutil.copytree(uninterrupted, workdir)
    for step in range(40, STEPS + 1, 10):
        shutil.rmtree(workdir / "checkpoints" / str(step))
    # Less than the metadata of the training state, 22 kB; the sizes of data files vary.
    line = ("train", "--config", recipe, "--workdir", workdir)
    result = forked(*line, max_file_size=20 * 1024)
    lines = result.stderr.splitlines()
    assert result.returncode == 1, lines
    assert lines[-1].startswith("vmoe: ") and "cannot be written" in lines[-1], lines
    assert "run the same command to resume" in lines[-1]
    assert not any("Traceback" in line for line in lines), lines
    assert "30" in os.listdir(workdir / "checkpoints")
    stderr, status = run(recipe, workdir)
    assert status == 0 and "corrupt" not in stderr, stderr
    assert_same(uninterrupted, workdir)


@pytest.fixture
def poisoned(config: TrainConfig, monkeypatch: pytest.MonkeyPatch) -> TrainConfig:
    """Batches 27 and 45 have NaN pixels."""

    batches = functools.partial(Poisoned, (27, 45))
    monkeypatch.setattr("vmoe.train.check.training_batches", batches)
    return configs.replace(config, evaluations=(EvalConfig(),), fewshot=FewShotConfig())


def test_a_nan_loss_stops_the_run_at_once_and_reports_the_step(
    poisoned: TrainConfig, tmp_path: Path
) -> None:
    with pytest.raises(Failure) as caught:
        train(poisoned, tmp_path)
    message = str(caught.value)
    assert "step 28: loss nan, gradient norm nan, learning rate 0.00" in message
    assert "step 20 is the last checkpoint" in message and "on_nan=rewind" in message
    assert steps_of(tmp_path) == [10, 20]


def test_rewinding_skips_the_bad_batches_compiles_nothing_again_and_is_deterministic(
    poisoned: TrainConfig,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    caplog: pytest.LogCaptureFixture,
) -> None:
    folders = [tmp_path / "first", tmp_path / "second"]
    step = make_train_step(poisoned, place(poisoned.model, jax.devices()))
    step.clear_cache()  # what other tests have compiled
    with jax.log_compiles():
        train(poisoned, folders[0], on_nan="rewind")
    stderr = capsys.readouterr().err
    assert "step 28: loss nan" in stderr and "rewinding, 1 of at most 3 times" in stderr
    # step 21 then uses batch 28, so step 38 uses batch 45
    assert "step 38: loss nan" in stderr and "rewinding, 2 of at most 3 times" in stderr
    assert rows(folders[0])[-1]["step"] == str(STEPS)
    assert np.isfinite([float(row["loss"]) for row in rows(folders[0])]).all()
    # A signal three steps before the NaN saves a checkpoint that the first run does not have.
    with jax.log_compiles():
        with signal_at_step(25), pytest.raises(Stopped, match="checkpoint saved at step 25"):
            train(poisoned, folders[1], on_nan="rewind")
        train(poisoned, folders[1], on_nan="rewind")
    assert_same(*folders)
    assert caplog.text.count("Compiling jit(step) ") == 1


def test_rewinding_stops_after_max_rewinds_and_frees_the_failed_state_before_it_restores(
    poisoned: TrainConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def live() -> int:
        gc.collect()
        return sum(array.nbytes for array in jax.live_arrays())

    def restore_newest(checkpoints: Checkpoints, **target: Any) -> Restored:
        size = sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(target))
        shares.append((live() - before) / size)
        return original(checkpoints, **target)

    shares: list[float] = []
    before, original = live(), Checkpoints.restore_newest
    monkeypatch.setattr(Checkpoints, "restore_newest", restore_newest)
    with pytest.raises(Failure, match="step 38: loss nan.*step 30 is the last checkpoint"):
        train(poisoned, tmp_path, on_nan="rewind", max_rewinds=1)
    assert len(shares) == 1 and shares[0] < 0.1


def test_a_diverging_learning_rate_ends_the_command_with_one_line(
    recipe: Path, tmp_path: Path
) -> None:
    recipe = recipe.with_name("breaks.py")
    recipe.write_text(
        f"{RECIPE}\n"
        "config = replace(config, optim=dict(lr=1e38, warmup_steps=0, grad_clip_norm=None),\n"
        "    model=dict(sparse_blocks=()), evaluations=(EvalConfig(),), fewshot=FewShotConfig())\n"
    )
    stderr, status = run(recipe, tmp_path / "run")
    assert status == 1 and "Traceback" not in stderr
    last = stderr.splitlines()[-1]
    assert last.startswith("vmoe: step ") and "there is no checkpoint yet; lower optim.lr" in last
    assert last.endswith("(--optim.lr, --optim.grad-clip-norm, --workdir, --on-nan rewind)")


def test_a_step_that_a_rewind_deleted_is_saved_again(tmp_path: Path) -> None:
    with Checkpoints(tmp_path, every=10, keep_latest=1) as checkpoints:
        for step in (10, 14):
            checkpoints.save(step, params={"kernel": np.zeros(2)})
        checkpoints.delete_unscheduled(keep=14)  # by another interval it was scheduled
        assert checkpoints.steps == [10, 14]
        checkpoints.delete_unscheduled()
        assert checkpoints.steps == [10]
        assert checkpoints.saved == 0
        checkpoints.save(14, params={"kernel": np.ones(2)})
        checkpoints.wait()
        assert checkpoints.steps == [10, 14]


def test_a_checkpoint_larger_than_the_free_space_is_not_started(tmp_path: Path) -> None:
    """Abstract arrays, larger than any disk."""
    huge = {"kernel": jax.ShapeDtypeStruct((2**40, 2**20), np.float32)}
    with (
        pytest.raises(Failure, match=r"bytes, the disk has .* left\); there is no earlier one"),
        Checkpoints(tmp_path, every=1, keep_latest=1) as checkpoints,
    ):
        checkpoints.save(1, params=huge)
    assert not list((tmp_path / "checkpoints").iterdir())
