"""One run in two real processes: who reports, what is agreed on, and what its folder is then."""

import csv
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path
from typing import NamedTuple

import jax
import numpy as np
import pytest
from flax import nnx

import vmoe
from vmoe import config as configs
from vmoe.train.loop import train

ROOT = Path(__file__).parents[1]
RECIPE = f"""
from pathlib import Path
from vmoe.config import EvalConfig, load, replace

config = replace(
    load(Path({str(ROOT / "configs" / "tiny.py")!r})), steps={{steps}}, log_every=5,
    optim=dict(warmup_steps=5), data=dict(mixup=0.0),
    evaluate_every=10, checkpoint_every=10, ema_decay=0.9, model=dict(moe=dict(images_per_group=4)),
    evaluations=(EvalConfig(batch_size=50),),
)
"""


class Ended(NamedTuple):
    """A process that ended: what it said, and its status."""

    told: str
    status: int


@pytest.fixture(scope="module")
def recipe(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("recipe") / "recipe.py"
    path.write_text(RECIPE.format(steps=20))
    return path


def start(recipe: Path, *workdirs: Path, words: tuple[str, ...] = ()) -> list[subprocess.Popen]:
    """The same line in two processes of two devices each; a workdir for both, or one each."""
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        port = found.getsockname()[1]
    line = ["train", "--config", str(recipe), "--distributed", *words, "--workdir"]
    return [
        subprocess.Popen(
            [sys.executable, "-m", "vmoe", *line, str(workdirs[i % len(workdirs)])],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            env=os.environ
            | {
                "JAX_COMPILATION_CACHE_DIR": str(ROOT / ".cache" / "jax"),
                "JAX_COORDINATOR_ADDRESS": f"127.0.0.1:{port}",
                "JAX_NUM_PROCESSES": "2",
                "JAX_PROCESS_ID": str(i),
                "XLA_FLAGS": "--xla_force_host_platform_device_count=2",
            },
        )
        for i in range(2)
    ]


def end(run: list[subprocess.Popen]) -> list[Ended]:
    told = [process.communicate(timeout=300)[1] for process in run]
    return [Ended(text, process.returncode) for text, process in zip(told, run, strict=True)]


@pytest.fixture(scope="module")
def whole(recipe: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    workdir = tmp_path_factory.mktemp("whole") / "run"
    first, other = end(start(recipe, workdir))
    assert first.status == other.status == 0, first.told + other.told
    assert "step 20/20" in first.told and "step" not in other.told.replace("steps", "")
    return workdir


def rows(workdir: Path, name: str) -> list[dict[str, str]]:
    found = csv.DictReader((workdir / f"{name}.csv").read_text().splitlines())
    return [{k: v for k, v in row.items() if k != "images_per_second"} for row in found]


def assert_close(one: Path, other: Path, atol: float) -> None:
    trees = (nnx.to_pure_dict(nnx.state(vmoe.load(folder), nnx.Param)) for folder in (one, other))
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=0, atol=atol), *trees)


def test_two_processes_train_what_one_trains_and_count_every_image_once(
    recipe: Path, whole: Path, tmp_path: Path
) -> None:
    """Groups divide over the four devices and nothing is mixed: one device decides alike."""
    train(configs.load(recipe), tmp_path / "alone")
    assert_close(whole, tmp_path / "alone", atol=5e-3)
    for ours, alone in zip(
        rows(whole, "metrics"), rows(tmp_path / "alone", "metrics"), strict=True
    ):
        assert float(ours["loss"]) == pytest.approx(float(alone["loss"]), rel=1e-4)
    evaluations = rows(whole, "evaluations")
    assert [(r["step"], r["weights"], r["images"]) for r in evaluations] == [
        (step, weights, "180") for step in ("10", "20") for weights in ("raw", "ema")
    ]


def test_what_pods_saved_is_opened_on_a_laptop_and_gone_on_with(
    recipe: Path, whole: Path, tmp_path: Path
) -> None:
    """Saved by two processes of two devices, gone on with by one of one: the same batches."""
    longer = tmp_path / "recipe.py"
    longer.write_text(RECIPE.format(steps=20))
    workdir = tmp_path / "run"
    shutil.copytree(whole, workdir)
    shutil.rmtree(workdir / "checkpoints" / "20")
    found = train(configs.load(longer), workdir)
    assert_close(whole, workdir, atol=5e-3)
    assert found[0][2].images == 180
    told = subprocess.run(
        [sys.executable, "-m", "vmoe", "evaluate", "--checkpoint", whole, "--json"],
        capture_output=True,
        text=True,
    )
    assert told.returncode == 0 and '"step": 20' in told.stdout, told.stderr


def test_a_signal_to_one_process_stops_all_after_the_same_step(
    recipe: Path, whole: Path, tmp_path: Path
) -> None:
    workdir = tmp_path / "run"
    run = start(recipe, workdir)
    deadline = time.monotonic() + 200
    while not (workdir / "metrics.csv").exists() or not rows(workdir, "metrics"):
        assert time.monotonic() < deadline and all(process.poll() is None for process in run)
        time.sleep(0.01)
    run[1].send_signal(signal.SIGTERM)
    first, other = end(run)
    assert first.status == other.status == 75, first.told + other.told
    assert "a signal to another process: stopped after step" in first.told.splitlines()[-1]
    assert "SIGTERM: stopped after step" in other.told.splitlines()[-1]
    step = first.told.split("stopped after step ")[1].split()[0]
    assert f"stopped after step {step} " in other.told
    first, other = end(start(recipe, workdir))
    assert f"goes on after step {step} of 20" in first.told and first.status == other.status == 0
    assert_close(whole, workdir, atol=0)
    for name in ("metrics", "evaluations", "experts"):
        assert rows(whole, name) == rows(workdir, name)


def test_damage_and_a_wrong_folder_are_agreed_on(recipe: Path, whole: Path, tmp_path: Path) -> None:
    workdir = tmp_path / "run"
    shutil.copytree(whole, workdir)
    for path in (workdir / "checkpoints" / "20").rglob("ocdbt.process_1/d/*"):
        path.write_bytes(path.read_bytes()[:10])  # of which the second process reads
    first, other = end(start(recipe, workdir))
    assert first.status == other.status == 0, first.told + other.told
    assert "checkpoint 20 is damaged (" in first.told and "after step 10 of 20" in first.told
    assert_close(whole, workdir, atol=0)
    first, other = end(start(recipe, workdir, words=("--seed", "1")))
    for ended in (first, other):
        assert ended.status == 2 and "holds a run of another config (seed is 0" in ended.told
        assert "Traceback" not in ended.told


def test_a_run_folder_that_only_one_process_sees_is_refused(recipe: Path, tmp_path: Path) -> None:
    first, other = end(start(recipe, tmp_path / "here", tmp_path / "there"))
    for ended in (first, other):
        assert ended.status == 2 and "does not see what the first one wrote" in ended.told
    assert not (tmp_path / "there").exists()


def test_one_killed_process_ends_the_others_and_the_run_ends_with_the_same_bits() -> None:
    line = ["--processes", "2", "--kills", "2", "--steps", "100"]
    done = subprocess.run(
        [sys.executable, ROOT / "scripts" / "kill_test.py", *line], capture_output=True, text=True
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert "2 kills, 100 steps: equal to the bit" in done.stdout


def test_who_takes_part_has_to_be_said() -> None:
    line = ["train", "--config", "configs/tiny.py", "--workdir", "runs/none", "--distributed"]
    done = subprocess.run(
        [sys.executable, "-m", "vmoe", *line], capture_output=True, text=True, cwd=ROOT
    )
    assert done.returncode == 2 and done.stderr.count("\n") == 1, done.stderr
    assert (
        "JAX_COORDINATOR_ADDRESS (host:port), JAX_NUM_PROCESSES and JAX_PROCESS_ID" in done.stderr
    )
