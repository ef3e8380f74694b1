"""Runs on eight devices: all meshes train the same and resume each other's checkpoints."""

import functools
import shutil
from pathlib import Path

import jax
import numpy as np
import pytest

import vmoe
from tests.command import ROOT
from tests.run_folder import Poisoned, assert_close, rows
from vmoe import config as configs
from vmoe.checkpoints.checksums import checksums
from vmoe.config import EvalConfig, FewShotConfig, TrainConfig
from vmoe.errors import UsageError
from vmoe.evaluate.fewshot import fewshot, open_fewshot
from vmoe.mesh import place
from vmoe.train import train


@pytest.fixture(scope="module")
def config() -> TrainConfig:
    """A group has four images, the batch of one device on any mesh of eight."""
    return configs.replace(
        configs.load(ROOT / "configs" / "tiny.py"),
        steps=20,
        optim=dict(warmup_steps=5),
        log_every=5,
        evaluate_every=10,
        checkpoint_every=10,
        ema_decay=0.9,
        model=dict(depth=1, sparse_blocks=(0,), moe=dict(router=dict(images_per_group=4))),
        evaluations=(EvalConfig(batch_size=50),),
        fewshot=FewShotConfig(("digits",), shots=(1, 5), every=20, batch_size=64),
    )


@pytest.fixture(scope="module")
def uninterrupted(config: TrainConfig, tmp_path_factory: pytest.TempPathFactory) -> Path:
    workdir = tmp_path_factory.mktemp("runs") / "uninterrupted"
    found = train(config, workdir, mesh="expert=4")
    assert [(evaluation.images, evaluation.batch_size) for _, _, evaluation in found] == [
        (180, 56)  # 50, rounded up to a multiple of eight devices
    ] * 2
    return workdir


def test_a_run_resumes_on_another_mesh_and_with_fsdp(
    config: TrainConfig,
    uninterrupted: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    workdir = tmp_path / "run"
    shutil.copytree(uninterrupted, workdir)
    shutil.rmtree(workdir / "checkpoints" / "20")
    train(config, workdir, mesh="expert=2", fsdp=True)
    stderr = capsys.readouterr().err
    now = str(place(config.model, jax.devices(), mesh="expert=2", fsdp=True))
    assert (
        f"the run started with mesh data=2,expert=4, now {now}: the same steps may round" in stderr
    )
    assert "resumed from step 10 of 20" in stderr and "corrupt" not in stderr
    assert_close(uninterrupted, workdir, atol=5e-3)
    for one, other in zip(losses(uninterrupted), losses(workdir), strict=True):
        assert one == pytest.approx(other, rel=1e-4)


def losses(workdir: Path) -> list[float]:
    return [float(row["loss"]) for row in rows(workdir)]


def test_a_probe_on_many_devices_is_that_of_one(config: TrainConfig, uninterrupted: Path) -> None:
    """The last batch is padding on most devices; groups have four images on one device too."""
    (data,) = open_fewshot(config.fewshot)
    loaded = vmoe.load(uninterrupted)
    alone = fewshot(loaded.model, [data], config.fewshot, loaded.preprocessing)
    rows_of_run = [row for row in rows(uninterrupted, "fewshot") if row["step"] == "20"]
    assert [row["shots"] for row in rows_of_run] == ["1", "5"]
    for row, accuracy in zip(rows_of_run, alone.accuracy["digits"], strict=True):
        assert float(row["accuracy"]) == pytest.approx(accuracy, abs=0.01)


def test_a_checksum_depends_on_the_values_and_not_on_the_sharding() -> None:
    rng = np.random.default_rng(0)
    arrays = {"a": rng.normal(size=(16, 24)).astype(np.float32), "b": np.arange(64, dtype=np.int8)}
    oracle = checksums(arrays)
    mesh = jax.make_mesh((2, 4), ("x", "y"), axis_types=(jax.sharding.AxisType.Auto,) * 2)
    for spec in (("x",), ("y",), (("x", "y"),), ()):
        sharding = jax.sharding.NamedSharding(mesh, jax.P(*spec))
        assert checksums(jax.device_put(arrays, sharding)) == oracle
    both = jax.sharding.NamedSharding(mesh, jax.P("x", "y"))
    assert checksums({"a": jax.device_put(arrays["a"], both)})["a"] == oracle["a"]
    for change in (lambda a: a.T.copy(), lambda a: a[::-1], lambda a: np.nextafter(a, 9.0)):
        assert checksums({"a": change(arrays["a"])})["a"] != oracle["a"]


def test_an_indivisible_batch_size_is_refused_before_anything_is_written(
    config: TrainConfig, tmp_path: Path
) -> None:
    with pytest.raises(UsageError, match="batch_size=36: each of 8 devices .* use 32 or 40"):
        train(configs.replace(config, batch_size=36), tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_a_run_on_many_devices_rewinds_after_a_nan_loss(
    config: TrainConfig,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    batches = functools.partial(Poisoned, (12,))
    monkeypatch.setattr("vmoe.train.check.training_batches", batches)
    train(config, tmp_path / "run", mesh="expert=4", on_nan="rewind")
    stderr = capsys.readouterr().err
    assert "mesh data=2,expert=4: 8 devices, 1 processes; each device has 4 images" in stderr
    assert "step 13: loss nan" in stderr and "rewinding, 1 of at most 3 times" in stderr
    assert np.isfinite(losses(tmp_path / "run")).all()
