"""A run with an expert of each kind, and whose router has a state, is resumed, read and planned."""

import json
import shutil
from pathlib import Path

import numpy as np
import orbax.checkpoint as ocp
import pytest
from PIL import Image

import vmoe as library
from tests.command import ROOT, forked, start, vmoe
from tests.run_folder import arrays, differences
from vmoe.workdir.layout import steps_of

pytestmark = pytest.mark.process

STEPS = 40
BIAS = "blocks/0/mlp/state/bias"
CONFIG = f"""
from pathlib import Path
from vmoe.config import (
    AttentionExpert, BiasBalanced, CnnExpert, ExpertList, GatedMlpExpert, IdentityExpert, MlpExpert,
    NoisyGate, ZeroExpert, load, replace,
)

every = (
    MlpExpert(), GatedMlpExpert(), CnnExpert(), AttentionExpert(num_heads=2), IdentityExpert(),
    ZeroExpert(),
)

config = replace(
    load(Path({str(ROOT / "configs" / "tiny.py")!r})), steps={STEPS}, log_every=5, ema_decay=0.9,
    evaluate_every=20, checkpoint_every=20,
    model=dict(
        depth=1, sparse_blocks=(0,), dropout=0.1,
        moe=dict(
            num_experts=6, experts=ExpertList(each=every), gate=NoisyGate(),
            router=BiasBalanced(priority="random"),
        ),
    ),
)
"""


@pytest.fixture(scope="module")
def config_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("config") / "config.py"
    path.write_text(CONFIG)
    return path


@pytest.fixture(scope="module")
def run(config_file: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    workdir = tmp_path_factory.mktemp("whole") / "run"
    result = vmoe("train", "--config", config_file, "--workdir", workdir)
    assert result.returncode == 0, result.stderr
    return workdir


def test_a_killed_run_is_bitwise_equal_to_an_uninterrupted_one(
    config_file: Path, run: Path, tmp_path: Path
) -> None:
    workdir = tmp_path / "run"
    line = ("train", "--config", config_file, "--workdir", workdir)
    with start(*line) as process:
        process.wait_until(lambda: steps_of(workdir))
        process.kill()
    result = vmoe(*line)
    assert result.returncode == 0 and "resumed from step" in result.stderr, result.stderr
    assert not differences(run, workdir, STEPS)
    for item in ("params", "ema"):
        assert f"{item}/{BIAS}" in arrays(workdir, STEPS)
    assert library.load(workdir).model.blocks[0].mlp.state["bias"][...].any()


@pytest.mark.parametrize(
    ("bias", "reason"),
    [
        (np.full(6, 7, np.float32), f"the checksum of params/{BIAS} differs from the one written"),
        (None, "blocks/0/mlp/state is missing, or unknown to the config"),
    ],
    ids=["damaged", "missing"],
)
def test_a_router_state_that_is_damaged_or_missing_makes_a_checkpoint_corrupt(
    bias: np.ndarray | None, reason: str, run: Path, tmp_path: Path
) -> None:
    workdir = tmp_path / "run"
    shutil.copytree(run, workdir)
    folder = (workdir / "checkpoints" / str(STEPS) / "params").absolute()
    handler = ocp.StandardCheckpointHandler()
    params = handler.restore(folder)
    layer = params["blocks"]["0"]["mlp"]
    assert layer["state"]["bias"].any()
    layer["state"]["bias"] = bias
    if bias is None:
        del layer["state"]
    shutil.rmtree(folder)
    ocp.Checkpointer(handler).save(folder, args=ocp.args.StandardSave(params))
    result = vmoe("evaluate", "--checkpoint", f"{workdir}/checkpoints/{STEPS}", "--no-use-ema")
    assert result.returncode == 1 and not result.stdout
    found, end = result.stderr.splitlines()
    assert found == f"{workdir}: checkpoint {STEPS} is corrupt ({reason})"
    assert end.endswith("no intact checkpoint; the reasons are above")


def test_it_is_converted_evaluated_inspected_and_predicts(run: Path, tmp_path: Path) -> None:
    """tests/cli/test_each_kind.py has the other commands."""
    copy = tmp_path / "copy"
    assert vmoe("convert", run, copy).returncode == 0
    results = [
        json.loads(vmoe("evaluate", "--checkpoint", x, "--data", "digits:test", "--json").stdout)
        for x in (run, copy)
    ]
    assert results[0]["accuracy"] == results[1]["accuracy"]
    image = tmp_path / "image.png"
    Image.fromarray(np.full((8, 8, 3), 100, np.uint8)).save(image)
    for line in (("predict", "--checkpoint", copy, image), ("inspect", run)):
        result = vmoe(*line)
        assert result.returncode == 0, (line, result.stderr)


def test_a_plan_of_several_devices_does_not_split_the_experts(config_file: Path) -> None:
    planned = forked("plan", "--config", config_file, "--devices", "4", "--json")
    assert planned.returncode == 0, planned.stderr
    assert "expert=1" in planned.stdout and "expert=2" not in planned.stdout
