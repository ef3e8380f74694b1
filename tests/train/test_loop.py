"""A training run: the files it writes, learning, and resuming."""

import contextlib
import functools
import json
import os
import shutil
import signal
import threading
import time
from collections.abc import Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest
from flax import nnx
from PIL import Image

import vmoe
from tests.command import ROOT, TIMEOUT, TINY, Process, alive, children, start
from tests.events import scalars
from tests.run_folder import assert_same, last_step, rows
from vmoe import config as configs
from vmoe.config import EvalConfig, RoutingOverrides, TrainConfig
from vmoe.data.sources import Source, open_source, open_splits
from vmoe.errors import UsageError
from vmoe.evaluate import evaluate
from vmoe.train import InitFrom, train
from vmoe.train.folder import open_workdir
from vmoe.train.init import messages, read_source
from vmoe.train.sinks import Entry, Sink
from vmoe.train.state import init_state
from vmoe.workdir.layout import read_config, read_environment, steps_of


@pytest.fixture(scope="module")
def config() -> TrainConfig:
    return configs.replace(
        configs.load(TINY),
        steps=40,
        log_every=10,
        evaluate_every=20,
        checkpoint_every=10,
        keep_latest=3,
        ema_decay=0.9,
        model=dict(dropout=0.1, moe=dict(experts=dict(dropout=0.1))),
        evaluations=(
            EvalConfig(),
            EvalConfig("wide", batch_size=100, routing=RoutingOverrides(capacity_factor=4.0)),
        ),
    )


@pytest.fixture(scope="module")
def opened() -> list[str]:
    """The splits of the data that ``run`` opened."""
    return []


class Monitor(Sink):
    """The rows of experts.csv of each report."""

    def __init__(self) -> None:
        self.rows: list[dict[str, Any]] = []

    def write(self, step: int, entries: Sequence[Entry]) -> None:
        for entry in entries:
            self.rows += [{"step": step} | row for row in entry.rows.get("experts.csv", [])]


@pytest.fixture(scope="module")
def monitor() -> Monitor:
    """A sink that ``run`` was given."""
    return Monitor()


class Guard(Sink):
    """Allows explicit transfers alone in the steps after a report without an evaluation."""

    def __init__(self) -> None:
        self.held, self.reports = contextlib.ExitStack(), set[int]()

    def write(self, step: int, entries: Sequence[Entry]) -> None:
        self.held.close()
        if step % 20:
            self.held.enter_context(jax.transfer_guard("disallow"))
            self.reports.add(step)


@pytest.fixture(scope="module")
def guard() -> Guard:
    """A sink that ``run`` was given."""
    return Guard()


@pytest.fixture(scope="module")
def run(
    config: TrainConfig,
    opened: list[str],
    monitor: Monitor,
    guard: Guard,
    tmp_path_factory: pytest.TempPathFactory,
) -> Path:
    def record(name: str, splits: Sequence[str], *args: Any) -> list[Source]:
        opened.extend(splits)
        return open_splits(name, splits, *args)

    workdir = tmp_path_factory.mktemp("runs") / "run"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("vmoe.train.check.open_splits", record)
        with guard.held:
            train(config, workdir, sinks=[monitor, guard])
    return workdir


def test_steps_reports_and_checkpoints_move_no_array_implicitly(run: Path, guard: Guard) -> None:
    """In steps 11 to 20 and 31 to 40, of whose transfers JAX allows explicit ones alone."""
    assert guard.reports == {10, 30} and last_step(run) == 40


@pytest.mark.process
def test_a_run_folder_has_the_config_model_environment_classes_and_metrics(
    run: Path, config: TrainConfig
) -> None:
    assert configs.from_json(TrainConfig, (run / "config.json").read_text()) == config
    assert "active per token" in (run / "model.txt").read_text()
    environment = json.loads((run / "environment.json").read_text())
    assert environment["jax"] == jax.__version__ and environment["devices"]
    for package in ("opencv-python-headless", "simplejpeg", "array-record", "scipy"):
        assert environment[package] == version(package)
    assert len((environment["commit"] or "0" * 40).split()[0]) == 40
    assert json.loads((run / "classes.json").read_text()) == list("0123456789")
    assert [row["step"] for row in rows(run)] == ["10", "20", "30", "40"]
    assert float(rows(run)[-1]["loss"]) < float(rows(run)[0]["loss"])


def test_metrics_have_norms_by_part_and_the_routing_of_a_sparse_block(run: Path) -> None:
    row = rows(run)[-1]
    for kind in ("parameters", "gradients", "updates"):
        for part in ("attention", "experts", "routers", "head", "positions", "norms"):
            assert float(row[f"norms/{kind}/{part}"]) > 0
    assert 0 <= float(row["block0/dropped"]) < 1
    assert 0 < float(row["block0/gate_entropy"]) <= np.log(4) + 1e-4
    experts = [row for row in rows(run, "experts") if row["step"] == "40"]
    assert [(row["block"], row["expert"]) for row in experts] == [("0", str(i)) for i in range(4)]
    for name in ("load", "importance"):
        assert sum(float(row[name]) for row in experts) == pytest.approx(1, abs=1e-4)


def test_a_sink_of_ones_own_gets_the_load_of_each_expert(run: Path, monitor: Monitor) -> None:
    stored = rows(run, "experts")
    assert len(stored) == 4 * 4  # reports, experts
    for given, row in zip(monitor.rows, stored, strict=True):
        assert all(float(value) == pytest.approx(float(row[x]), 1e-5) for x, value in given.items())


def test_every_evaluation_set_has_its_settings_and_raw_and_ema_results(run: Path) -> None:
    evaluations = rows(run, "evaluations")
    expected = [
        (step, name, weights)
        for step in ("20", "40")
        for name in ("validation", "wide")
        for weights in ("raw", "ema")
    ]
    assert [(row["step"], row["set"], row["weights"]) for row in evaluations] == expected
    by_name = {(row["step"], row["set"], row["weights"]): row for row in evaluations}
    assert float(by_name["40", "wide", "raw"]["dropped"]) == 0
    assert float(by_name["40", "validation", "raw"]["dropped"]) > 0
    assert by_name["40", "validation", "ema"] != by_name["40", "validation", "raw"]


def test_tensorboard_events_equal_the_csv_files(run: Path) -> None:
    values = scalars(run)
    for row in rows(run):
        for name, value in row.items():
            tag = name if "/" in name else f"train/{name}"
            if name != "step":
                tag = tag.replace(" ", "_")
                assert values[tag, int(row["step"])] == pytest.approx(float(value), rel=1e-4)
    evaluation = rows(run, "evaluations")[0]
    accuracy = values["validation_raw/accuracy", 20]
    assert accuracy == pytest.approx(float(evaluation["accuracy"]), rel=1e-4)
    assert ("block0/load/3", 40) in values


def test_training_a_finished_run_again_changes_nothing(run: Path, config: TrainConfig) -> None:
    names = ("metrics.csv", "evaluations.csv", "experts.csv")
    before = [(run / name).read_text() for name in names]
    evaluations = train(config, run)
    assert [(run / name).read_text() for name in names] == before
    results = [(name, weights, f"{result.accuracy:.6g}") for name, weights, result in evaluations]
    last = [row for row in rows(run, "evaluations") if row["step"] == "40"]
    assert results == [(row["set"], row["weights"], row["accuracy"]) for row in last]


def test_a_run_folder_of_another_config_is_refused_with_the_differences(
    run: Path, config: TrainConfig
) -> None:
    def open_folder(config: TrainConfig) -> None:
        open_workdir(run, config, tuple("0123456789"), read_environment(run), None)

    open_folder(config)
    before = (run / "config.json").read_text()
    other = configs.replace(config, seed=1, optim=dict(lr=0.25))
    with pytest.raises(UsageError, match="holds a run of another config") as caught:
        open_folder(other)
    assert "optim.lr is 0.005 there and 0.25 here" in str(caught.value)
    sets = (
        EvalConfig(),
        EvalConfig("wide", batch_size=100, routing=RoutingOverrides(capacity_factor=2.0)),
    )
    with pytest.raises(
        UsageError, match=r"evaluations\.1\.routing\.capacity_factor is 4\.0 there and 2\.0"
    ):
        open_folder(configs.replace(config, evaluations=sets))
    assert "seed is 0 there and 1 here" in str(caught.value)
    assert (run / "config.json").read_text() == before


def test_changed_data_or_environment_is_reported(
    run: Path, config: TrainConfig, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    workdir = tmp_path / "run"
    shutil.copytree(run, workdir)
    path = workdir / "environment.json"
    for text in ("null", "[]", "3"):
        path.write_text(text)
        with pytest.raises(UsageError, match="environment.json: corrupt; restore it, or use anoth"):
            read_environment(workdir)
    names = tuple("0123456789")
    with pytest.raises(UsageError, match="environment.json: corrupt"):
        open_workdir(workdir, config, names, {}, None)
    then = json.loads((run / "environment.json").read_text()) | {
        "data": "other",
        "images": 3,
        "jax": "0.1",
    }
    then["simplejpeg"] = "0.2"
    path.write_text(json.dumps(then))
    # Its learning rate rises after the warmup, which is refused for new runs alone.
    config = configs.replace(config, optim=dict(lr=2e-6))
    (workdir / "config.json").write_text(configs.to_json(config))
    train(config, workdir)
    stderr = capsys.readouterr().err
    assert "has changed since this run began (3 images then, 1257 now)" in stderr
    assert f"the run started with jax 0.1, now {jax.__version__}" in stderr
    assert f"the run started with simplejpeg 0.2, now {version('simplejpeg')}" in stderr
    (workdir / "classes.json").write_text('["cat", "dog"]')
    with pytest.raises(UsageError, match="other classes of the training data"):
        open_workdir(workdir, config, names, then, None)


def test_a_loaded_checkpoint_has_the_accuracy_that_the_run_reported(run: Path) -> None:
    found = {(r["step"], r["weights"]): r for r in rows(run, "evaluations") if r["set"] != "wide"}
    for path, step, use_ema in [
        (run, "40", True),
        (run, "40", False),
        (run / "checkpoints" / "last", "40", True),
        (run / "checkpoints" / "20", "20", True),
    ]:
        result = evaluate(
            vmoe.load(path, use_ema=use_ema).model, open_source("digits", "validation")
        )
        expected = found[step, "ema" if use_ema else "raw"]
        assert f"{result.accuracy:.6g}" == expected["accuracy"]
        assert result.cross_entropy == pytest.approx(float(expected["cross_entropy"]), rel=1e-4)


def test_a_run_that_starts_from_another_starts_its_moving_average_from_it_too(
    run: Path, config: TrainConfig, tmp_path: Path
) -> None:
    initial = read_source(InitFrom(str(run)), tmp_path / "new", config.model)
    assert initial is not None and initial.record["weights"] == "ema"
    state = initial.apply(init_state(config))
    expected = nnx.to_pure_dict(nnx.state(vmoe.load(run).model, nnx.Param))
    for params in (state.params, state.ema):
        jax.tree.map(np.testing.assert_array_equal, params, expected)


def test_the_source_of_a_run_is_shown_relative_to_the_working_directory(
    run: Path, config: TrainConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(run.parent)
    initial = read_source(InitFrom(run.name), tmp_path / "new", config.model)
    assert initial is not None and initial.record["path"] == str(run)
    first = next(messages(initial, initial.class_names))
    assert first.startswith(f"starting from {run.name}, step 40 (moving average)")


def test_a_head_that_is_kept_for_other_classes_is_reported_with_the_remedy(
    run: Path, config: TrainConfig, tmp_path: Path
) -> None:
    initial = read_source(InitFrom(str(run)), tmp_path / "new", config.model)
    assert initial is not None
    *_, last = messages(initial, ("other", *initial.class_names[1:]))
    assert last.startswith("the head is kept, with classes 0, 1, ")
    assert last.endswith("; for a new head, set init_new_head=True")


@pytest.mark.process
def test_the_newest_checkpoints_and_the_best_are_kept(tiny_run: Path, tmp_path: Path) -> None:
    """A trained model gets worse as the learning rate rises: its best checkpoint is the first."""
    worse = configs.replace(
        configs.load(TINY),
        steps=20,
        log_every=20,
        keep_latest=1,
        evaluate_every=5,
        checkpoint_every=10,
        ema_decay=0.9,
        optim=dict(lr=0.3, warmup_steps=19, grad_clip_norm=None),
    )
    train(worse, tmp_path, init=tiny_run)
    found = rows(tmp_path, "evaluations")
    accuracy = {int(r["step"]): float(r["accuracy"]) for r in found if r["weights"] == "ema"}
    best = max(accuracy, key=lambda step: (accuracy[step], step))
    assert best not in (10, 20), accuracy
    assert steps_of(tmp_path) == [best, 20]
    found = evaluate(
        vmoe.load(tmp_path / "checkpoints" / "best").model, open_source("digits", "validation")
    )
    assert found.accuracy == pytest.approx(accuracy[best], abs=1e-5)


@pytest.mark.process
def test_the_same_seed_gives_the_same_run_even_in_a_thread_without_signal_handlers(
    tiny_run: Path, tmp_path: Path
) -> None:
    """The other run is a run of the command, in the main thread of another process."""
    thread = threading.Thread(target=functools.partial(train, read_config(tiny_run), tmp_path))
    thread.start()
    thread.join()
    assert_same(tiny_run, tmp_path)


@pytest.mark.usefixtures("run")
def test_training_never_opens_the_test_split(opened: list[str]) -> None:
    assert set(opened) == {"train", "validation"}


@pytest.mark.process
@pytest.mark.slow
def test_memory_does_not_grow_over_a_thousand_steps(tmp_path: Path) -> None:
    """Measures the real command from step 500 to 1,500, with evaluations and checkpoints."""
    arguments = ["--steps", "1500", "--log-every", "50", "--ema-decay", "0.9", "--batch-size", "8"]
    arguments += ["--evaluate-every", "300", "--checkpoint-every", "300"]
    sizes: dict[int, float] = {}
    with start("train", "--workdir", tmp_path, "--config", TINY, *arguments) as process:
        for step in range(50, 1500, 50):
            process.wait_until(lambda step=step: last_step(tmp_path) >= step)
            resident = Path(f"/proc/{process.pid}/statm").read_text().split()[1]
            sizes[step] = int(resident) * os.sysconf("SC_PAGE_SIZE") / 2**20
        assert process.wait() == 0, process.stderr
    early, late = (
        np.median([size for step, size in sizes.items() if low <= step <= low + 200])
        for low in (500, 1250)
    )
    assert late - early < 20, f"{early:.0f} MiB, then {late:.0f}"


@pytest.mark.process
@pytest.mark.slow
def test_the_digits_recipe_reaches_78_percent_on_validation_in_a_tenth_of_its_steps(
    tmp_path: Path,
) -> None:
    """Three seeds gave 83.9 to 91.7; the validation split has 180 images. Compiled as users do."""
    optimized = {"JAX_DISABLE_MOST_OPTIMIZATIONS": "False", "XLA_FLAGS": ""}
    recipe = ROOT / "configs" / "digits.py"
    short = ("--steps", "220", "--evaluate-every", "220", "--checkpoint-every", "220")
    with start(
        "train", "--config", recipe, "--workdir", tmp_path, *short, environment=optimized
    ) as process:
        assert process.wait() == 0, process.stderr
    last = rows(tmp_path, "evaluations")[-1]
    assert last["step"] == rows(tmp_path)[-1]["step"] and float(last["accuracy"]) >= 0.78


PHOTOS = """
from pathlib import Path
from vmoe.config import DataConfig, load, replace

config = replace(
    load(Path({tiny!r})), data=DataConfig("folder:{folder}"), steps=10_000, log_every=1,
    evaluate_every=10_000, checkpoint_every=10_000, batch_size=8,
    model=dict(depth=1, sparse_blocks=(), num_classes=2),
)
"""


@pytest.fixture
def photos(tmp_path: Path) -> Path:
    folder = tmp_path / "photos"
    for i in range(60):
        path = folder / "ab"[i % 2] / f"{i}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (8, 8), (i, 0, 0)).save(path)
    return folder


def on_photos(photos: Path, *workers: int) -> list[tuple[Process, Path]]:
    """Runs of the real command that have taken some steps, with their folders.

    Args:
        workers: the number of data workers of each run.
    """
    recipe, runs = photos.parent / "recipe.py", []
    recipe.write_text(PHOTOS.format(tiny=str(ROOT / "configs" / "tiny.py"), folder=photos))
    for count in workers:
        workdir = photos.parent / f"run{count}"
        line = ("train", "--config", recipe, "--workdir", workdir)
        runs.append((start(*line, "--data.num-workers", str(count)), workdir))
    for process, workdir in runs:
        process.wait_until(lambda workdir=workdir: last_step(workdir) >= 3)
    return runs


@pytest.mark.process
def test_a_source_that_hangs_is_shown_and_a_signal_stops_the_run(photos: Path) -> None:
    """A run that reads in threads and one with a worker process, which wait at the same time.

    The files become pipes, which nobody writes to.
    """
    runs = on_photos(photos, 0, 1)
    with runs[0][0], runs[1][0]:
        for path in [*photos.rglob("*.png")]:
            pipe = path.with_suffix(".pipe")
            os.mkfifo(pipe)
            pipe.replace(path)  # at no time is there no file
        for process, workdir in runs:
            process.wait_until(
                lambda process=process: "waiting for data for 10 s" in process.stderr
            )
            step, left = last_step(workdir), children(process.pid)
            process.send_signal(signal.SIGTERM)
            assert process.wait() == 75
            assert f"vmoe: SIGTERM: checkpoint saved at step {step} of 10000" in process.stderr
            assert steps_of(workdir) == [step]
            deadline = time.monotonic() + TIMEOUT
            while any(map(alive, left)):  # the tracker of shared memory ends a moment later
                assert time.monotonic() < deadline, left
                time.sleep(0.01)


@pytest.mark.process
@pytest.mark.slow
def test_a_source_that_disappears_ends_the_run_with_one_line_and_a_checkpoint(photos: Path) -> None:
    ((process, workdir),) = on_photos(photos, 0)
    with process:
        shutil.rmtree(photos)
        assert process.wait() == 2
        stderr = process.stderr
    last = stderr.splitlines()[-1]
    assert last.startswith(f"vmoe: {photos}/") and last.endswith(": no such file")
    assert "Traceback" not in stderr and steps_of(workdir)


@pytest.mark.process
@pytest.mark.slow
def test_a_worker_that_is_killed_ends_the_run_with_one_line_and_a_checkpoint(photos: Path) -> None:
    ((process, workdir),) = on_photos(photos, 1)
    with process:
        for pid in children(process.pid):
            if b"spawn_main" in Path(f"/proc/{pid}/cmdline").read_bytes():
                os.kill(pid, signal.SIGKILL)
        assert process.wait() == 1
        stderr = process.stderr
    last = stderr.splitlines()[-1]
    assert last.startswith("vmoe: data worker 1 of 1 was killed by SIGKILL, perhaps because")
    assert "run the same command to resume" in last and "Traceback" not in stderr
    assert steps_of(workdir)
