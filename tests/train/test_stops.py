"""Whatever stops a run, nothing is lost: kills, signals, damage, a full disk, a second run, NaN."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import jax
import numpy as np
import pytest

from tests.train.test_loop import assert_same, rows
from vmoe import config as configs
from vmoe.checkpoints.run import Checkpoints
from vmoe.config import EvalConfig, TrainConfig
from vmoe.data.pipeline import training_batches
from vmoe.errors import Failure, UsageError
from vmoe.train import loop
from vmoe.train.loop import train

ROOT = Path(__file__).parents[2]
STEPS = 120
RECIPE = f"""
from pathlib import Path
from vmoe.config import EvalConfig, load, replace

config = replace(
    load(Path({str(ROOT / "configs" / "tiny.py")!r})), steps={STEPS}, log_every=5, ema_decay=0.9,
    evaluate_every=10, checkpoint_every=10,
    model=dict(dropout=0.1, moe=dict(expert_dropout=0.1, router=dict(priority="random"))),
    evaluations=(EvalConfig(), EvalConfig("one by one", batch_size=1)),
)
"""


@pytest.fixture(scope="module")
def recipe(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("recipe") / "recipe.py"
    path.write_text(RECIPE)
    return path


@pytest.fixture(scope="module")
def config(recipe: Path) -> TrainConfig:
    return configs.load(recipe)


@pytest.fixture(scope="module")
def whole(recipe: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run that was never stopped, by the same command as those that are."""
    workdir = tmp_path_factory.mktemp("whole") / "run"
    told, status = run(recipe, workdir)
    assert status == 0, told
    return workdir


def start(recipe: Path, workdir: Path, *, limit: str = "unlimited") -> subprocess.Popen[str]:
    """The real command, in a process; ``limit``: the largest file that it may write, in KiB."""
    words = [sys.executable, "-m", "vmoe", "train", "--config", recipe, "--workdir", workdir]
    return subprocess.Popen(
        ["bash", "-c", f'ulimit -f {limit}; exec "$@"', "bash", *map(str, words)],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
        env=os.environ | {"JAX_COMPILATION_CACHE_DIR": str(ROOT / ".cache" / "jax")},
    )


def run(recipe: Path, workdir: Path, *, limit: str = "unlimited") -> tuple[str, int]:
    """What the command says, and its exit status."""
    with start(recipe, workdir, limit=limit) as process:
        return process.stderr.read(), process.wait()


def kill_when(ready: Callable[[], bool], recipe: Path, workdir: Path) -> None:
    with start(recipe, workdir) as process:
        wait_until(ready, process)
        process.kill()


def wait_until(ready: Callable[[], bool], process: subprocess.Popen[str]) -> None:
    deadline = time.monotonic() + 120
    while not ready():
        assert process.poll() is None and time.monotonic() < deadline, process.stderr.read()
        time.sleep(0.001)


def reached(workdir: Path, step: int) -> bool:
    path = workdir / "metrics.csv"
    return path.exists() and any(int(row["step"]) >= step for row in rows(workdir))


def test_a_run_killed_while_it_trains_saves_and_evaluates_ends_with_the_same_bits() -> None:
    done = subprocess.run(
        [sys.executable, ROOT / "scripts" / "kill_test.py", "--kills", "3", "--steps", "200"],
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert "3 kills, 200 steps: equal to the bit" in done.stdout


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_saves_and_exits_with_75_and_says_how_to_go_on(
    number: signal.Signals, recipe: Path, whole: Path, tmp_path: Path
) -> None:
    workdir = tmp_path / "run"
    with start(recipe, workdir) as process:
        wait_until(lambda: reached(workdir, 25), process)
        process.send_signal(number)
        *_, last = process.stderr.read().splitlines()
    assert process.returncode == 75
    assert last.startswith(f"vmoe: {number.name}: stopped after step ")
    assert "everything is saved; the same line goes on" in last
    step = int(last.split("after step ")[1].split()[0])
    assert (workdir / "checkpoints" / str(step)).is_dir()
    told, status = run(recipe, workdir)
    assert f"goes on after step {step} of {STEPS}" in told and status == 0
    assert_same(whole, workdir)


def test_a_signal_during_an_evaluation_gives_it_up_and_it_is_done_again(
    config: TrainConfig, whole: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    done = 0

    def evaluate(*words: object, **settings: object) -> object:
        nonlocal done
        done += 1
        if done == 6:  # of the second evaluated step
            signal.raise_signal(signal.SIGTERM)
        return real(*words, **settings)

    real = loop.evaluate
    with monkeypatch.context() as patch:
        patch.setattr(loop, "evaluate", evaluate)
        with pytest.raises(loop.Stopped, match="SIGTERM: stopped after step 20"):
            train(config, tmp_path)
    assert {row["step"] for row in rows(tmp_path, "evaluations")} == {"10"}
    train(config, tmp_path)
    evaluations = rows(tmp_path, "evaluations")
    assert [r["step"] for r in evaluations] == [r["step"] for r in rows(whole, "evaluations")]


def test_a_second_signal_leaves_at_once_with_the_last_checkpoint_intact(
    recipe: Path, whole: Path, tmp_path: Path
) -> None:
    workdir = tmp_path / "run"
    with start(recipe, workdir) as process:
        wait_until(lambda: reached(workdir, 15), process)
        while process.poll() is None:
            process.send_signal(signal.SIGINT)
            time.sleep(0.002)
    assert process.returncode == 128 + signal.SIGINT
    told, status = run(recipe, workdir)
    assert "damaged" not in told and status == 0
    assert_same(whole, workdir)


def garble(folder: Path) -> None:
    for path in folder.rglob("d/*"):
        content = bytearray(path.read_bytes())
        content[::100] = bytes(byte ^ 1 for byte in content[::100])
        path.write_bytes(content)


def cut_off(folder: Path) -> None:
    for path in folder.rglob("d/*"):  # all: of a single one nothing may be read
        path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def lose(folder: Path) -> None:
    shutil.rmtree(folder / "checksums")


def swap(folder: Path) -> None:
    """Whole arrays, as Orbax wrote them, but those of another step."""
    shutil.rmtree(folder / "params")
    shutil.copytree(folder.with_name(str(STEPS - 10)) / "params", folder / "params")


def change_a_checksum(folder: Path) -> None:
    path = folder / "checksums" / "metadata"
    checksums = json.loads(path.read_text())
    name = next(iter(checksums))
    path.write_text(json.dumps(checksums | {name: checksums[name].replace("-", ".")}))


def list_checksums(folder: Path) -> None:
    (folder / "checksums" / "metadata").write_text("[]")


@pytest.mark.parametrize("harm", [garble, cut_off, lose, swap, change_a_checksum, list_checksums])
def test_a_damaged_checkpoint_is_named_and_the_one_before_is_used(
    harm: Callable[[Path], None], config: TrainConfig, whole: Path, tmp_path: Path, recipe: Path
) -> None:
    workdir = tmp_path / "run"
    shutil.copytree(whole, workdir)
    harm(workdir / "checkpoints" / str(STEPS))
    told, status = run(recipe, workdir)
    assert status == 0, told
    assert f"checkpoint {STEPS} is damaged (" in told
    assert f"goes on after step {STEPS - 10} of {STEPS}" in told
    assert "Traceback" not in told
    assert (workdir / "checkpoints" / "damaged" / str(STEPS)).is_dir()
    assert_same(whole, workdir)


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("metrics.csv", b"step,loss\nabc,1\n"),
        ("metrics.csv", b"other,columns\n1,2\n"),
        ("evaluations.csv", b"\xff\xfe\x00step"),
    ],
)
def test_a_damaged_table_is_named_and_left_as_it_is(
    name: str, content: bytes, recipe: Path, whole: Path, tmp_path: Path
) -> None:
    workdir = tmp_path / "run"
    shutil.copytree(whole, workdir)
    (workdir / name).write_bytes(content)
    told, status = run(recipe, workdir)
    assert status == 1 and told.startswith("vmoe: ") and told.count("\n") == 1, told
    assert f"{workdir / name} is damaged (" in told
    assert (workdir / name).read_bytes() == content


def test_without_any_good_checkpoint_a_run_says_so_and_keeps_what_is_left(
    recipe: Path, whole: Path, tmp_path: Path
) -> None:
    workdir = tmp_path / "run"
    shutil.copytree(whole, workdir)
    steps = sorted(path.name for path in (workdir / "checkpoints").iterdir())
    for step in steps:
        garble(workdir / "checkpoints" / step / "params")
    told, status = run(recipe, workdir)
    assert status == 1 and told.startswith("vmoe: ") and told.count("\n") == 1, told
    assert f"no checkpoint is good; checkpoint {STEPS} is damaged" in told
    damaged = workdir / "checkpoints" / "damaged"
    assert sorted(path.name for path in damaged.iterdir()) == steps
    before = (workdir / "metrics.csv").read_text()
    told, status = run(recipe, workdir)
    assert status == 1 and "no checkpoint is good" in told, "it began anew"
    assert (workdir / "metrics.csv").read_text() == before


def test_two_runs_in_one_folder_are_one_too_many(
    recipe: Path, config: TrainConfig, tmp_path: Path
) -> None:
    workdir = tmp_path / "run"
    with start(recipe, workdir) as process:
        wait_until(lambda: reached(workdir, 5), process)
        with pytest.raises(UsageError, match=f"process {process.pid} trains in it"):
            train(config, workdir)
        process.kill()
    train(config, workdir)


def test_a_disk_that_takes_no_more_ends_the_run_with_one_line_and_the_last_checkpoint(
    recipe: Path, whole: Path, tmp_path: Path
) -> None:
    """A limit on the size of files stands for the full disk: writing fails in the same places."""
    workdir = tmp_path / "run"
    kill_when(lambda: (workdir / "checkpoints" / "30").exists(), recipe, workdir)
    steps = sorted(p.name for p in (workdir / "checkpoints").iterdir() if p.name.isdigit())

    told, status = run(recipe, workdir, limit="30")
    lines = told.splitlines()
    assert status == 1, lines
    assert lines[-1].startswith("vmoe: ") and "cannot be written" in lines[-1], lines
    assert "the same line goes on" in lines[-1]
    assert not any("Traceback" in line for line in lines), lines
    assert steps[-1] in os.listdir(workdir / "checkpoints")
    told, status = run(recipe, workdir)
    assert status == 0 and "damaged" not in told, told
    assert_same(whole, workdir)


@pytest.fixture
def poisoned(config: TrainConfig, monkeypatch: pytest.MonkeyPatch) -> TrainConfig:
    """Batches 27 and 65 hold pixels that are no numbers."""

    def batches(*words: object, **options: object) -> object:
        def poison(i: int, batch: object) -> object:
            bad = i in (27, 65)
            return batch._replace(images=batch.images * np.float32(np.nan)) if bad else batch

        return training_batches(*words, **options).map_with_index(poison)

    monkeypatch.setattr(loop, "training_batches", batches)
    return configs.replace(config, evaluations=(EvalConfig(),))


def test_a_loss_that_is_no_number_stops_the_run_at_once_and_says_where(
    poisoned: TrainConfig, tmp_path: Path
) -> None:
    with pytest.raises(Failure) as caught:
        train(poisoned, tmp_path)
    message = str(caught.value)
    assert "step 28: loss nan, gradient norm nan, learning rate 0.00" in message
    assert "step 20 is the last good checkpoint" in message and "--on-nan rewind" in message
    assert sorted(p.name for p in (tmp_path / "checkpoints").iterdir()) == ["10", "20"]


def test_rewinding_goes_on_past_the_data_that_broke_it_and_repeats_to_the_bit(
    poisoned: TrainConfig, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folders = [tmp_path / "one", tmp_path / "other"]
    train(poisoned, folders[0], on_nan="rewind")
    told = capsys.readouterr().err
    assert "step 28: loss nan" in told and "goes back, 1 of at most 3 times" in told
    # step 20 then takes batch 28, so that batch 65 is that of step 58
    assert "step 58: loss nan" in told and "goes back, 2 of at most 3 times" in told
    assert rows(folders[0])[-1]["step"] == str(STEPS)
    assert np.isfinite([float(row["loss"]) for row in rows(folders[0])]).all()
    # A signal three steps before the break leaves a checkpoint that the other run has not.
    real, seen = loop.Report.step, []

    def step(self: loop.Report, number: int) -> None:
        if number == 25 and not seen:
            seen.append(signal.raise_signal(signal.SIGINT))
        real(self, number)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(loop.Report, "step", step)
        with pytest.raises(loop.Stopped, match="stopped after step 25"):
            train(poisoned, folders[1], on_nan="rewind")
    train(poisoned, folders[1], on_nan="rewind")
    assert_same(*folders)


def test_rewinding_ends_after_so_many_times(poisoned: TrainConfig, tmp_path: Path) -> None:
    with pytest.raises(Failure, match="step 58: loss nan.*step 50 is the last good checkpoint"):
        train(poisoned, tmp_path, on_nan="rewind", max_rewinds=1)


def test_a_learning_rate_that_breaks_the_loss_ends_the_command_with_one_line(
    recipe: Path, tmp_path: Path
) -> None:
    recipe = recipe.with_name("breaks.py")
    recipe.write_text(
        f"{RECIPE}\nconfig = replace(config, optim=dict(lr=1e38, warmup_steps=0, grad_clip_norm=None))\n"
    )
    told, status = run(recipe, tmp_path / "run")
    assert status == 1 and "Traceback" not in told
    last = told.splitlines()[-1]
    assert last.startswith("vmoe: step ") and "no checkpoint yet; lower --optim.lr" in last


def test_a_checkpoint_that_has_no_room_is_not_begun(tmp_path: Path) -> None:
    """Arrays as large as no disk is, of which no byte exists."""
    huge = {"kernel": jax.ShapeDtypeStruct((2**40, 2**20), np.float32)}
    with (
        pytest.raises(Failure, match=r"bytes, and the disk has .* left\); there is none before it"),
        Checkpoints(tmp_path, every=1, keep_latest=1) as checkpoints,
    ):
        checkpoints.save(1, params=huge)
    assert not list((tmp_path / "checkpoints").iterdir())
