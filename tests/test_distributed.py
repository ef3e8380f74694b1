"""One run in two real processes: reports, agreement, resuming, and the run folder.

Its processes exchange the slots of one layer in two parts, and the rows of another, which has no
capacity, except those of its hottest expert.
"""

import json
import os
import shutil
import signal
import subprocess
import sys
from functools import partial
from pathlib import Path

import jax
import numpy as np
import pytest

import vmoe
from tests.command import ROOT, TIMEOUT, Process, forked, free_port, start
from tests.hostility.kill import kill_once, log_of, saving
from tests.run_folder import assert_close, differences, parameters, rows
from tests.two_hosts import CASES, DAMAGED, make_hosts
from vmoe import config as configs
from vmoe.checkpoints.restore import sha256_of
from vmoe.config.data import ImageChecks
from vmoe.data.pipeline import training_batches
from vmoe.data.reading import Reading
from vmoe.data.sources import open_source
from vmoe.evaluate import evaluate
from vmoe.train import train
from vmoe.train.state import init_state
from vmoe.train.step import make_train_step
from vmoe.workdir.layout import LEFT_OUT, UNREADABLE, steps_of

pytestmark = pytest.mark.process

RECIPE = f"""
from pathlib import Path
from vmoe.config import EvalConfig, FewShotConfig, load, replace

config = load(Path({str(ROOT / "configs" / "tiny.py")!r}))
slots = replace(config.model.moe, router=dict(images_per_group=4), exchange=dict(chunks=2))
rows = replace(slots, router=dict(dropless=True), exchange=dict(hot_experts=1, buffer_factor=4.0))
config = replace(
    config, steps=20, log_every=5,
    optim=dict(warmup_steps=5), data=dict(mixup=0.0), evaluate_every=10, checkpoint_every=10,
    ema_decay=0.9,
    model=dict(depth=2, sparse_blocks=(0, 1), moe=(slots, rows)),
    evaluations=(EvalConfig(batch_size=60),),
    fewshot=FewShotConfig(("digits",), shots=(5,), every=20, batch_size=64),
)
"""


def run_two_hosts(folder: Path, trained: Path) -> list[tuple[str, str]]:
    """The output of the two processes of ``two_hosts``: a line for each case, and a last one."""
    shared = {
        "PYTHONPATH": str(ROOT),
        "JAX_COORDINATOR_ADDRESS": f"127.0.0.1:{free_port()}",
        "JAX_NUM_PROCESSES": "2",
    }
    run = [
        subprocess.Popen(
            [sys.executable, "-m", "tests.two_hosts"],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            cwd=host,
            env=os.environ | shared | {"JAX_PROCESS_ID": str(i), "XDG_CACHE_HOME": str(host)},
        )
        for i, host in enumerate(make_hosts(folder, trained))
    ]
    try:
        outputs = [process.communicate(timeout=TIMEOUT) for process in run]
    finally:
        for process in run:
            process.kill()
    assert not any(process.returncode for process in run), outputs
    return list(zip(*(out.splitlines()[-len(CASES) - 1 :] for out, _ in outputs), strict=True))


@pytest.fixture(scope="module")
def two_hosts(
    uninterrupted: Path, tmp_path_factory: pytest.TempPathFactory
) -> tuple[Path, list[tuple[str, str]]]:
    """The folder and the output of two processes that run all cases."""
    folder = tmp_path_factory.mktemp("hosts")
    return folder, run_two_hosts(folder, uninterrupted)


@pytest.mark.slow
def test_processes_that_differ_or_cannot_resume_agree_on_the_error_and_know_the_same_checkpoints(
    two_hosts: tuple[Path, list[tuple[str, str]]], uninterrupted: Path
) -> None:
    """One test for all cases, since they share the two processes."""
    folder, (*errors, last) = two_hosts
    for (name, case), (first, other) in zip(CASES.items(), errors, strict=True):
        status, message = json.loads(first)
        assert first == other and status == case.status, (name, first, other)
        assert message.startswith(case.message), (name, message)
    assert not (folder / "run").exists() and not (folder / "host1" / "here").exists()
    assert not (folder / "host0" / "behind" / "config.json").exists()
    for name in ("version", "link"):
        assert steps_of(folder / name) == steps_of(uninterrupted)
    # The checkpoints, whether 1 is the best, and the processes of the host with the cores of each.
    assert last == ("[[1], true, [2, 4], [2, 4], [2, 4]]", "[[1], true, [2, 4], [2, 4], [2, 2]]")


@pytest.mark.slow
def test_one_file_lists_the_unreadable_images_of_both_processes_once_in_whole_lines(
    two_hosts: tuple[Path, list[tuple[str, str]]], monkeypatch: pytest.MonkeyPatch
) -> None:
    """In six epochs each process reads half of all images, and some of them twice."""
    folder = two_hosts[0]
    monkeypatch.chdir(folder / "host0")
    for name, split in ((UNREADABLE, "train"), (LEFT_OUT, "validation")):
        source = open_source(DAMAGED, split, ImageChecks(on_error="replace"))
        paths = [source.path(i) for i in range(len(source))]
        damaged = sorted(path for path in paths if int(Path(path).stem) % 2 == 0)
        lines = (folder / "replaced" / name).read_text().splitlines()
        assert damaged and sorted(line.partition(": ")[0] for line in lines) == damaged, name


@pytest.fixture(scope="module")
def recipe(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("recipe") / "recipe.py"
    path.write_text(RECIPE)
    return path


def start_two(
    recipe: Path,
    workdir: Path,
    *,
    devices: tuple[int, int] = (2, 2),
    logged: bool = False,
) -> list[Process]:
    """Starts the command in two processes, each with two devices or the given number.

    Args:
        logged: append stderr to the logs that ``kill_once`` reads.
    """
    shared = {
        "JAX_COORDINATOR_ADDRESS": f"127.0.0.1:{free_port()}",
        "JAX_NUM_PROCESSES": "2",
    }
    mesh = ("--mesh", "expert=2x2")  # over both processes
    line = ("train", "--config", recipe, "--distributed", *mesh, "--workdir", workdir)
    return [
        start(
            *line,
            environment=shared | {"JAX_PROCESS_ID": str(i), "JAX_NUM_CPU_DEVICES": str(count)},
            log=log_of(workdir, i) if logged else None,
        )
        for i, count in enumerate(devices)
    ]


def end(run: list[Process]) -> list[subprocess.CompletedProcess[str]]:
    """Waits for both processes."""
    with run[0], run[1]:
        return [
            subprocess.CompletedProcess([], process.wait(), process.stdout, process.stderr)
            for process in run
        ]


@pytest.fixture(scope="module")
def uninterrupted(recipe: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    workdir = tmp_path_factory.mktemp("uninterrupted") / "run"
    first, other = end(start_two(recipe, workdir))
    assert first.returncode == other.returncode == 0, first.stderr + other.stderr
    assert "step 20/20" in first.stderr and "step" not in other.stderr.replace("steps", "")
    return workdir


def test_two_processes_train_like_one(recipe: Path, uninterrupted: Path) -> None:
    """Groups divide over the four devices and mixup is off, so one device decides the same.

    Slots and rows are sent inside a process, then between both.
    """
    config = configs.load(recipe)
    batches = training_batches(open_source("digits", "train"), config)
    state, train_step, losses = init_state(config), make_train_step(config), {}
    for step in range(1, 11):
        state, metrics = train_step(state, batches[step - 1].batch)
        losses[str(step)] = float(metrics["loss"])
    for use_ema, alone in ((False, state.params), (True, state.ema)):
        ours = parameters(uninterrupted / "checkpoints" / "10", use_ema=use_ema)
        jax.tree.map(partial(np.testing.assert_allclose, rtol=0, atol=5e-3), ours, alone)
    first, second, *_ = rows(uninterrupted)
    for row in (first, second):
        assert float(row["loss"]) == pytest.approx(losses[row["step"]], rel=1e-4)


def test_a_run_of_two_processes_resumes_in_one_and_evaluates_every_image_once(
    recipe: Path, uninterrupted: Path, tmp_path: Path
) -> None:
    """A run of two processes with two devices each resumes on one device with the same batches."""
    workdir = tmp_path / "run"
    shutil.copytree(uninterrupted, workdir)
    shutil.rmtree(workdir / "checkpoints" / "20")
    found = train(configs.load(recipe), workdir)
    assert found[0][2].images == 180
    assert_close(uninterrupted, workdir, atol=5e-3)
    for ours, alone in zip(rows(uninterrupted), rows(workdir), strict=True):
        assert float(ours["loss"]) == pytest.approx(float(alone["loss"]), rel=1e-4)
    evaluations = rows(uninterrupted, "evaluations")
    assert [(r["step"], r["weights"], r["images"]) for r in evaluations] == [
        (step, weights, "180") for step in ("10", "20") for weights in ("raw", "ema")
    ]
    ours, alone = rows(uninterrupted, "fewshot"), rows(workdir, "fewshot")
    assert [row["step"] for row in ours] == ["20"] and ours[0]["weights"] == "ema"
    assert float(ours[0]["accuracy"]) == pytest.approx(float(alone[0]["accuracy"]), abs=0.01)
    loaded = vmoe.load(uninterrupted)
    result = evaluate(loaded.model, open_source("digits", "validation"), Reading(60))
    assert (loaded.step, result.images) == (20, 180)


def test_different_numbers_of_devices_are_refused(recipe: Path, tmp_path: Path) -> None:
    message = "vmoe: distributed: the processes have [1, 2] devices: give each the same number\n"
    for result in end(start_two(recipe, tmp_path / "run", devices=(1, 2))):
        assert result.returncode == 2 and result.stderr.endswith(message)


@pytest.mark.slow
def test_a_killed_or_signaled_process_ends_the_other_and_past_a_corrupt_checkpoint_the_run_is_equal(
    recipe: Path, uninterrupted: Path, tmp_path: Path
) -> None:
    """Bitwise, after a signal and a kill during a save. At the end, the newest checkpoint lacks
    bytes that the second process reads.

    ``python -m tests.hostility kill --processes 2`` kills more often.
    """
    workdir = tmp_path / "run"

    run = start_two(recipe, workdir)
    run[0].wait_until(lambda: "step 5/20" in run[0].stderr)
    run[1].send_signal(signal.SIGTERM)
    first, other = end(run)
    assert first.returncode == other.returncode == 75, first.stderr + other.stderr
    assert "a signal to another process: checkpoint saved at step" in first.stderr.splitlines()[-1]
    assert "SIGTERM: checkpoint saved at step" in other.stderr.splitlines()[-1]
    step = first.stderr.split("checkpoint saved at step ")[1].split()[0]
    assert f"checkpoint saved at step {step} " in other.stderr
    run = start_two(recipe, workdir, logged=True)
    with run[0], run[1]:
        assert kill_once(run, workdir, saving, 5, 0.5, 1).unfinished_checkpoint
    assert f"resumed from step {step} of 20" in log_of(workdir, 0).read_text()
    newest = workdir / "checkpoints" / "10"
    shutil.copytree(workdir / "checkpoints" / step, newest)
    index = newest / "checksums" / "metadata"
    content = json.loads(index.read_text()) | {"step": 10}
    del content["sha256"]
    index.write_text(json.dumps(content | {"sha256": sha256_of(content)}))
    for path in newest.rglob("ocdbt.process_1/d/*"):
        path.write_bytes(path.read_bytes()[:10])
    first, other = end(start_two(recipe, workdir))
    assert first.returncode == other.returncode == 0, first.stderr + other.stderr
    assert "checkpoint 10 is corrupt (" in first.stderr and f"from step {step} of" in first.stderr
    assert "a copy of" not in first.stderr
    assert not differences(uninterrupted, workdir, 20)


def test_distributed_without_a_cluster_or_the_jax_variables_is_refused() -> None:
    words = ("train", "--config", "configs/tiny.py", "--workdir", "runs/none", "--distributed")
    result = forked(*words)
    assert result.returncode == 2 and result.stderr.count("\n") == 1, result.stderr
    assert (
        "JAX_COORDINATOR_ADDRESS (host:port), JAX_NUM_PROCESSES and JAX_PROCESS_ID" in result.stderr
    )
