"""What may change in the config of a run that is resumed, and what the folder then says."""

import itertools
import json
import re
import shutil
import sys
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest
from PIL import Image

from tests.command import ROOT, TINY, vmoe
from tests.run_folder import arrays, assert_close, differences, last_step, rows
from tests.train.test_stops import signal_at_step
from vmoe import config as configs
from vmoe.config import EvalConfig, TrainConfig
from vmoe.config.changes import MAY_CHANGE
from vmoe.errors import Failure, UsageError
from vmoe.mesh import place
from vmoe.train import train
from vmoe.train.check import open_data
from vmoe.train.environment import environment
from vmoe.train.folder import open_workdir
from vmoe.train.sinks import CsvFile
from vmoe.train.step import make_train_step
from vmoe.workdir.layout import read_config

PAGE = (ROOT / "docs" / "change_a_run.md").read_text()
MORE = (EvalConfig(), EvalConfig("more", "test"))
CHANGES: dict[str, dict[str, Any]] = {  # by the key of MAY_CHANGE
    "log_every": dict(log_every=3),
    "evaluate_every": dict(evaluate_every=5),
    "checkpoint_every": dict(checkpoint_every=3),
    "keep_latest": dict(keep_latest=1),
    "evaluations": dict(evaluations=MORE),
    "evaluations.batch_size": dict(evaluations=(EvalConfig(batch_size=64),)),
    "fewshot": dict(fewshot=dict(data=(), shots=(5,))),
    "fewshot.every": dict(fewshot=dict(every=2)),
    "fewshot.batch_size": dict(fewshot=dict(batch_size=64)),
    "data.num_workers": dict(data=dict(num_workers=2)),
    "data.on_error": dict(data=dict(on_error="replace")),
    "data.max_pixels": dict(data=dict(max_pixels=1_000_000)),
    "accumulate": dict(accumulate=2),
    "model.remat": dict(model=dict(remat=True)),
    "model.moe.exchange.hot_experts": dict(model=dict(moe=dict(exchange=dict(hot_experts=1)))),
    "model.moe.exchange.chunks": dict(model=dict(moe=dict(exchange=dict(chunks=2)))),
    "model.moe.exchange.ragged": dict(model=dict(moe=dict(exchange=dict(ragged=True)))),
}
ROUNDED = ("accumulate", "model.remat")
SECOND = "evaluations.batch_size", "fewshot", "model.moe.exchange.ragged"
APART = (SECOND, *((key,) for key in ROUNDED))
TOGETHER = (tuple(key for key in CHANGES if key not in itertools.chain(*APART)), *APART)
"""What one run is resumed with: each key once."""


@pytest.fixture(scope="module")
def config() -> TrainConfig:
    """Groups of 8 images, without noise and mixing, so that parts of a batch are like the whole.

    With SGD, since Adam makes steps of one size also of a gradient that is only rounding.
    """
    return configs.replace(
        configs.load(TINY),
        steps=12,
        log_every=2,
        evaluate_every=6,
        checkpoint_every=6,
        optim=dict(kind="sgd", lr=0.05, end_lr=0.01, warmup_steps=2),
        data=dict(mixup=0.0),
        model=dict(
            moe=dict(
                experts=dict(implementation="blocked"),
                router=dict(noise_std=0.0, images_per_group=8),
            )
        ),
        fewshot=dict(data=("digits",), shots=(1,), every=6),
    )


def environment_of(config: TrainConfig) -> tuple[tuple[str, ...], dict[str, Any]]:
    """The class names of the training data, and the environment."""
    data = open_data(config)
    return data.source.class_names, environment(data, place(config.model, jax.devices()[:1]))


def opened(workdir: Path, config: TrainConfig) -> list[str]:
    return open_workdir(workdir, config.with_steps(1), *environment_of(config), None)[0]


def started(workdir: Path, config: TrainConfig) -> Path:
    """A folder with a run of which step 6 is a checkpoint, so far as the folder's files know."""
    workdir.mkdir()
    opened(workdir, config)
    (workdir / "checkpoints" / "6").mkdir(parents=True)
    return workdir


def test_fields_that_decide_no_number_may_change_each_with_a_line(
    config: TrainConfig, tmp_path: Path
) -> None:
    workdir, now = started(tmp_path / "run", config), environment_of(config)
    of_images = {"evaluations.data", "data.name"}
    assert CHANGES.keys() | of_images | {"data.check"} == MAY_CHANGE.keys()
    for key, changed in CHANGES.items():
        new = configs.replace(config, **changed)
        of_new = environment_of(new) if key in ("evaluations", "fewshot") else now
        (line,), extended = open_workdir(workdir, new, *of_new, None)
        assert not extended and MAY_CHANGE[key] in line
        assert key in ("evaluations", "fewshot") or key.rpartition(".")[2] in line
        assert key.rpartition(".")[2].replace("_", "-") in PAGE
        assert read_config(workdir) == new
        if hasattr(config, key) and key not in ROUNDED:  # nothing is compiled again
            assert make_train_step(new) is make_train_step(config)
        assert open_workdir(workdir, new, *of_new, None) == ([], False)
        measured = json.loads((workdir / "environment.json").read_text())["evaluations"]
        assert measured.keys() >= {"validation", "few-shot digits, test"}
        open_workdir(workdir, config, *(now if key == "fewshot" else of_new), None)
    lines = (workdir / "changes.txt").read_text().splitlines()
    assert len(lines) == 2 * len(CHANGES)
    assert "more" in measured
    assert lines[0].endswith(" step 6: log_every 2 -> 3")
    assert lines[8].endswith(" step 6: set 'more' is added")
    assert lines[9].endswith(" step 6: set 'more' is left out")
    assert lines[12].endswith(" step 6: few-shot sets digits -> none")
    assert lines[13].endswith(" step 6: few-shot sets none -> digits")


class Killed(BaseException):
    """Ends a call at any point, as a kill does."""


class KillAt:
    """Ends this process's work when it has replaced or removed some files."""

    def __init__(self) -> None:
        self.left = -1
        sys.addaudithook(self)

    def __call__(self, event: str, _: Any) -> None:
        if event in ("os.rename", "os.remove") and self.left >= 0:
            self.left -= 1
            if self.left < 0:
                raise Killed


def test_a_kill_at_any_instant_neither_loses_nor_repeats_a_line_of_a_change(
    config: TrainConfig, tmp_path: Path
) -> None:
    now, kill = environment_of(config), KillAt()
    new = configs.replace(config, log_every=3, checkpoint_every=3)
    for at in itertools.count():
        workdir = started(tmp_path / str(at), config)
        kill.left, killed = at, False
        try:
            open_workdir(workdir, new, *now, None)
        except Killed:
            killed = True
        kill.left = -1
        for resumed in (new, config):
            open_workdir(workdir, resumed, *now, None)
            assert read_config(workdir) == resumed
        lines = (workdir / "changes.txt").read_text().splitlines()
        assert [line.split(" step 6: ")[1] for line in lines] == [
            "log_every 2 -> 3",
            "checkpoint_every 6 -> 3",
            "log_every 3 -> 2",
            "checkpoint_every 3 -> 6",
        ], at
        assert not list(workdir.glob(".*")) and not list(workdir.glob("*.json.*"))
        if not killed:
            assert at > 3
            break


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        (dict(seed=1), "seed is 0 there and 1 here"),
        (dict(steps=10), "steps is 12 there and 10 here"),
        (dict(evaluations=MORE[::-1]), "evaluations.0.name is validation there and more here"),
        (dict(evaluations=(EvalConfig(image_size=12),)), "evaluations.0.image_size is None there"),
        (dict(log_every=3, batch_size=8), r"\(batch_size is 32 there and 8 here\)"),
    ],
)
def test_what_decides_the_numbers_may_not_change_once_there_is_a_checkpoint(
    config: TrainConfig, tmp_path: Path, changed: dict[str, Any], message: str
) -> None:
    workdir, new = started(tmp_path / "run", config), configs.replace(config, **changed)
    before = {path.name: path.read_bytes() for path in workdir.iterdir() if path.is_file()}
    with pytest.raises(UsageError, match=message):
        open_workdir(workdir, new, *environment_of(config), None)
    assert before == {path.name: path.read_bytes() for path in workdir.iterdir() if path.is_file()}


def photos(folder: Path, green: int = 0) -> Path:
    for i in range(40):
        path = folder / "ab"[i % 2] / f"{i}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (8, 8), (5 * i, green, 0)).save(path)
    return folder


def on_photos(config: TrainConfig, folder: Path) -> TrainConfig:
    data = f"folder:{folder}"
    sets = (EvalConfig(), EvalConfig("again", f"{data}:train"))
    fewshot = dict(data=(data,))
    model = dict(num_classes=2)
    return configs.replace(
        config, data=dict(name=data), evaluations=sets, fewshot=fewshot, model=model
    )


def test_images_may_be_moved_and_other_images_are_refused(
    config: TrainConfig, tmp_path: Path
) -> None:
    workdir = started(tmp_path / "run", on_photos(config, photos(tmp_path / "there")))
    moved = on_photos(config, shutil.copytree(tmp_path / "there", tmp_path / "here"))
    lines = opened(workdir, moved)
    fields = ("evaluations.1.data", "data.name")
    for field in fields:
        assert any(field in line and "/here" in line for line in lines), "\n".join(lines)
    assert any(re.search(r"few-shot sets folder:.*/there -> folder:.*/here:", x) for x in lines)
    assert read_config(workdir) == moved
    again = on_photos(config, shutil.copytree(tmp_path / "there", tmp_path / "third"))
    assert len(opened(workdir, again)) >= len(fields)
    with pytest.raises(UsageError) as caught:
        opened(workdir, on_photos(config, photos(tmp_path / "other", green=9)))
    assert str(caught.value).count(", of other images") == len(fields)


def test_sets_may_be_added_and_one_that_returns_with_other_images_is_said(
    config: TrainConfig, tmp_path: Path
) -> None:
    fewer, folder = on_photos(config, photos(tmp_path / "there")), photos(tmp_path / "more")
    sets = (*fewer.evaluations, EvalConfig("more", f"folder:{folder}:train"))
    fewshot = dict(data=(f"folder:{folder}", *fewer.fewshot.data))
    more = configs.replace(fewer, evaluations=sets, fewshot=fewshot)
    workdir = started(tmp_path / "run", fewer)
    assert any(": one L2 is chosen for all of them" in line for line in opened(workdir, more))
    opened(workdir, fewer)
    photos(folder, green=9)
    lines = opened(workdir, more)
    for name in ("more", f"few-shot folder:{folder}, train"):
        (line,) = (line for line in lines if f"evaluation set {name!r}" in line)
        assert "has changed since this run began (31 images then, 31 now)" in line
    reordered = configs.replace(more, fewshot=dict(data=fewshot["data"][::-1]))
    assert opened(workdir, reordered) == opened(workdir, more)
    other = configs.replace(more, fewshot=dict(data=("digits", *fewshot["data"][:1])))
    assert any(": few-shot sets folder:" in line for line in opened(workdir, other))
    assert read_config(workdir) == other


def test_a_run_without_a_checkpoint_is_set_aside_for_another_config(
    config: TrainConfig, tmp_path: Path
) -> None:
    workdir, new = started(tmp_path / "run", config), configs.replace(config, optim=dict(lr=0.1))
    (workdir / "checkpoints" / "6").rmdir()
    CsvFile(workdir / "metrics.csv").append(13, [{"loss": 1.0}])
    for other in (new, configs.replace(config, checkpoint_every=2)):
        with pytest.raises(Failure, match="rows up to step 13, but there is no checkpoint"):
            opened(workdir, other)  # after twice the interval it is not late but lost
    (workdir / "metrics.csv").unlink()
    CsvFile(workdir / "metrics.csv").append(6, [{"loss": 1.0}])
    before = (workdir / "config.json").read_text()
    (line,) = opened(workdir, new)
    assert "optim.lr is 0.05 there and 0.1 here" in line and "metrics.csv.old, config.json" in line
    assert (workdir / "config.json.old").read_text() == before
    assert read_config(workdir) == new and not (workdir / "metrics.csv").exists()
    rising = configs.replace(config, optim=dict(lr=1e-3, end_lr=1e-2))
    with pytest.raises(UsageError, match="the learning rate would rise"):
        train(rising, workdir)
    assert read_config(workdir) == new
    opened(workdir, configs.replace(config, seed=3))
    assert (workdir / "config.json.old.2").exists()


def test_a_csv_file_of_an_older_version_keeps_its_columns(tmp_path: Path) -> None:
    older, newer = (CsvFile(tmp_path / "evaluations.csv") for _ in range(2))
    older.append(1, [{"accuracy": 0.5}])
    newer.restore(1, older.position())
    newer.append(2, [{"accuracy": 0.25, "batch_size": 64}])
    assert (tmp_path / "evaluations.csv").read_text() == "step,accuracy\n1,0.5\n2,0.25\n"


@pytest.fixture(scope="module")
def whole(config: TrainConfig, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An uninterrupted run."""
    workdir = tmp_path_factory.mktemp("whole") / "run"
    train(config, workdir)
    return workdir


@pytest.mark.slow
@pytest.mark.parametrize("keys", TOGETHER, ids="+".join)
def test_a_run_that_is_resumed_with_changes_ends_with_the_same_parameters(
    whole: Path, config: TrainConfig, tmp_path: Path, keys: tuple[str, ...]
) -> None:
    """Bit for bit, or to 1e-5 where the same steps may round differently."""
    workdir = tmp_path / "run"
    shutil.copytree(whole, workdir)
    shutil.rmtree(workdir / "checkpoints" / "12")
    for key in keys:
        config = configs.replace(config, **CHANGES[key])
    train(config, workdir)
    if keys[0] in ROUNDED:
        assert_close(whole, workdir, atol=1e-5)
    else:
        assert arrays(whole, 12) == arrays(workdir, 12)
        before, after = ({row["step"]: row for row in rows(x)} for x in (whole, workdir))
        assert all(after[step] == before[step] for step in before.keys() & after.keys())
    sizes = {row["batch_size"] for row in rows(workdir, "evaluations")}
    assert sizes == {"64" if "evaluations.batch_size" in keys else "256"}


@pytest.mark.slow
def test_a_set_that_is_added_to_a_finished_run_is_evaluated(
    whole: Path, config: TrainConfig, tmp_path: Path
) -> None:
    workdir = tmp_path / "run"
    shutil.copytree(whole, workdir)
    train(configs.replace(config, evaluations=MORE), workdir)
    last = [row for row in rows(workdir, "evaluations") if row["step"] == "12"]
    assert [row["set"] for row in last] == ["validation", "more"]
    assert last[0] == rows(whole, "evaluations")[-1]
    np.testing.assert_equal(arrays(whole, 12), arrays(workdir, 12))
    two = ("digits", "digits:train,validation")
    train(configs.replace(config, evaluations=MORE, fewshot=dict(data=two)), workdir)
    last = [row for row in rows(workdir, "fewshot") if row["step"] == "12"]
    assert [row["data"] for row in last] == [*two]


@pytest.mark.process
def test_a_command_that_is_stopped_and_resumed_with_its_data_moved_ends_bit_for_bit_the_same(
    tmp_path: Path,
) -> None:
    """The oracle is the same command on the images where they were, not interrupted."""
    there, here = photos(tmp_path / "there"), tmp_path / "elsewhere" / "photos"
    every = (("log", 5), ("evaluate", 20), ("checkpoint", 20))
    settings = [word for name, n in every for word in (f"--{name}-every", str(n))]

    def line(name: str, folder: Path) -> list[str | Path]:
        words = ["train", "--config", TINY, "--workdir", tmp_path / name, *settings]
        more = ["--steps", "40", "--batch-size", "16", "--model.num-classes", "2", "--data.flip"]
        return [*words, *more, "--data.name", f"folder:{folder}"]

    result = vmoe(*line("whole", there))
    assert result.returncode == 0, result.stderr
    with signal_at_step(27):
        result = vmoe(*line("moved", there))
    assert result.returncode == 75 and last_step(tmp_path / "moved") == 25, result.stderr
    here.parent.mkdir()
    there.rename(here)
    result = vmoe(*line("moved", here))
    assert result.returncode == 0 and f"-> folder:{here}: the same images" in result.stderr
    assert not differences(tmp_path / "whole", tmp_path / "moved", 40)
    (change,) = (tmp_path / "moved" / "changes.txt").read_text().splitlines()
    assert "data.name" in change
