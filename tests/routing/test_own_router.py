"""A router that a user writes in one class has all that ours have; the library does not change."""

import json
import shutil
from pathlib import Path

import jax
import numpy as np
import pytest
from flax import nnx
from scipy.special import softmax

from tests.command import vmoe
from tests.own_router import Own
from tests.run_folder import arrays
from vmoe.config import load, to_json
from vmoe.nn.moe import MoE

FILE = Path(__file__).parents[1] / "own_router.py"


def test_a_layer_adds_up_its_losses_and_the_sums_for_its_state_over_groups() -> None:
    rngs = nnx.Rngs(0)
    experts = [nnx.Linear(6, 6, rngs=rngs) for _ in range(3)]
    layer = MoE(experts, nnx.Linear(6, 3, rngs=rngs), Own(rate=0.25))
    tokens = jax.random.normal(jax.random.key(1), (20, 5, 6))  # 3 groups of 7, 7 and 6 images
    _, record = nnx.jit(MoE.forward)(layer, tokens)
    kernel, bias = (np.float64(x) for x in (layer.gate.kernel[...], layer.gate.bias[...]))
    largest = softmax(np.float64(tokens) @ kernel + bias, -1).max(-1)  # b n
    by_group = [(part**2).sum() for part in (largest[:7], largest[7:14], largest[14:])]
    np.testing.assert_allclose(record.aux_loss, np.mean(by_group), rtol=1e-5)
    nnx.jit(MoE.update_state)(layer, record)
    temperature = 0.75 + 0.25 * largest.mean()
    np.testing.assert_allclose(layer.state["temperature"][...], temperature, rtol=1e-6)
    _, record = nnx.jit(MoE.forward)(layer, tokens)
    sharper = softmax((np.float64(tokens) @ kernel + bias) / temperature, -1)
    np.testing.assert_allclose(record.gates[0], sharper[:7].reshape(35, 3), rtol=1e-4)


@pytest.mark.process
def test_it_trains_is_saved_and_resumes_by_command_and_other_commands_import_its_file(
    tmp_path: Path,
) -> None:
    """A data worker imports it, too; the resumed run has lost its last checkpoint, and has none."""
    run, whole = tmp_path / "run", tmp_path / "whole"
    steps = ("--steps=4", "--checkpoint-every=2", "--optim.warmup-steps=0")
    train = ("train", "--config", FILE, "--model.moe.router.rate=0.25", *steps)
    at_once = vmoe(*train, "--workdir", whole)
    assert at_once.returncode == 0, at_once.stderr
    shutil.copytree(whole, run)
    shutil.rmtree(run / "checkpoints" / "4")
    resumed = vmoe(*train, "--data.num-workers=0", "--workdir", run)
    assert resumed.returncode == 0 and "resumed from step 2" in resumed.stderr, resumed.stderr
    for folder in (run, whole):
        router = json.loads((folder / "config.json").read_text())["model"]["moe"]["router"]
        assert router | {"kind": "own", "rate": 0.25} == router
    assert arrays(run, 4) == arrays(whole, 4)
    evaluated = vmoe("--import", FILE, "evaluate", "--checkpoint", run)
    assert evaluated.returncode == 0 and "digits:test" in evaluated.stdout, evaluated.stderr


@pytest.mark.parametrize(
    ("arguments", "problem"),
    [
        (["--import"], "--import needs a Python file"),
        (["--import", "missing.py", "config"], "missing.py: "),
        (
            ["config", "--config", "{run}"],
            "router.kind: 'other' is none of 'token_choice'",
        ),
    ],
)
def test_a_router_that_is_not_known_or_a_file_that_is_not_there_is_one_line(
    tmp_path: Path, arguments: list[str], problem: str
) -> None:
    file = tmp_path / "config.json"
    file.write_text(to_json(load("tiny")).replace('"token_choice"', '"other"'))
    result = vmoe(*(word.format(run=file) for word in arguments))
    assert result.returncode == 2 and result.stderr.count("\n") == 1
    assert problem in result.stderr, result.stderr
