"""Options choose the kind of a router, a gate and the experts, and set the fields of that kind.

A run whose layers have different routers is read by some commands, and refused by others;
``test_each_kind.py`` has every command on one router at a time.
"""

import base64
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import load_file

from tests.command import TINY, vmoe
from vmoe.config import (
    CosineGate,
    ExpertChoice,
    GatedMlpExpert,
    MoEConfig,
    TrainConfig,
    from_json,
    load,
    replace,
    to_json,
)

ROUTERS = ("switch", "gshard", "bias_balanced", "random", "hash")


def moe(*options: str) -> Any:
    """The MoE layer of the config under these options, as JSON."""
    printed = vmoe("config", "--config", TINY, *options).stdout
    assert from_json(TrainConfig, printed)
    return json.loads(printed)["model"]["moe"]


def test_a_kind_has_its_own_options_and_defaults() -> None:
    layer = moe(
        "--model.moe.router.kind", "expert_choice", "--model.moe.router.noise-std", "0.5",
        "--model.moe.gate.kind=cosine", "--model.moe.experts.kind", "gated_mlp",
        "--model.moe.experts.activation", "gelu",
    )  # fmt: skip
    assert layer["router"] == vars(ExpertChoice(noise_std=0.5))
    assert layer["gate"]["temperature"] == CosineGate().temperature
    assert layer["experts"] == vars(GatedMlpExpert(activation="gelu"))


def test_the_kind_of_the_config_keeps_the_settings_of_the_config() -> None:
    assert moe("--model.moe.router.kind", "token_choice") == moe()


def test_a_list_names_each_expert_and_its_elements_have_options() -> None:
    layer = moe(
        "--model.moe.experts.kind", "list", "--model.moe.experts.each", "mlp", "cnn", "zero",
        "--model.moe.experts.each.1.kernel-size", "5", "--model.moe.num-experts", "3",
    )  # fmt: skip
    assert [expert["kind"] for expert in layer["experts"]["each"]] == ["mlp", "cnn", "zero"]
    assert layer["experts"]["each"][1]["kernel_size"] == 5


def test_one_of_several_layers_can_have_another_kind(tmp_path: Path) -> None:
    file = tmp_path / "two.json"
    model = dict(depth=2, sparse_blocks=(0, 1), moe=(MoEConfig(), MoEConfig()))
    file.write_text(to_json(replace(load(TINY), model=model)))
    printed = vmoe("config", "--config", file, "--model.moe.1.router.kind", "expert_choice").stdout
    routers = [layer["router"]["kind"] for layer in json.loads(printed)["model"]["moe"]]
    assert routers == ["token_choice", "expert_choice"]
    refused = vmoe("config", "--config", file, "--model.moe.1.experts.each", "mlp")
    assert refused.returncode == 2 and "Unrecognized options: --model" in refused.stderr


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (
            ["--model.moe.router.kind", "sofa"],
            "model.moe.router.kind=sofa: did you mean 'soft'? (--model.moe.router.kind)",
        ),
        (["--model.moe.router.kind"], "Missing value for argument '--model.moe.router.kind'"),
        (["--model.moe.router.kind", "expert_choice", "--model.moe.router.k", "1"], "router.k"),
        (["--model.moe.9.router.kind", "soft"], "Unrecognized options: --model.moe.9.router.kind"),
        (["--model.moe.experts.each", "mlp"], "Unrecognized options: --model.moe.experts.each"),
        (
            ["--model.moe.experts.kind", "list", "--model.moe.experts.each", "mlp", "cnnn"],
            "model.moe.experts.each=cnnn: did you mean 'cnn'? (--model.moe.experts.each)",
        ),
        (
            ["--model.moe.experts.kind", "list", "--model.moe.experts.each", "mlp", "cnn"],
            "model.moe.num_experts=4 with model.moe.experts.each: list as many experts",
        ),
    ],
)
def test_a_kind_that_does_not_exist_or_fit_is_refused_in_one_line(
    options: list[str], message: str
) -> None:
    result = vmoe("config", "--config", TINY, *options)
    assert result.returncode == 2 and message in result.stderr and not result.stdout
    assert len(result.stderr.splitlines()) == 1


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two steps of training with a layer of each router, which options choose."""
    folder, blocks = tmp_path_factory.mktemp("routers"), range(len(ROUTERS))
    layers = (MoEConfig(num_experts=3),) * len(ROUTERS)
    model = dict(depth=len(ROUTERS), sparse_blocks=tuple(blocks), moe=layers)
    (folder / "config.json").write_text(to_json(replace(load(TINY), model=model)))
    kinds = [x for i, kind in enumerate(ROUTERS) for x in (f"--model.moe.{i}.router.kind", kind)]
    options = ("--steps", "2", "--optim.warmup-steps", "0", "--workdir", folder / "run")
    result = vmoe("train", "--config", folder / "config.json", *kinds, *options)
    assert result.returncode == 0, result.stderr
    assert "2 steps, validation accuracy" in result.stdout
    return folder / "run"


@pytest.mark.process
@pytest.mark.parametrize(
    ("text", "printed"),
    [
        ("evaluate --checkpoint {run}", "choices dropped"),
        ("inspect {run}", [f"block {i}: 3 experts, {kind}, " for i, kind in enumerate(ROUTERS)]),
        ("plan --config {run}/config.json --devices 1", "MFLOPs per step"),
    ],
    ids=lambda text: text.split()[0] if isinstance(text, str) else "",
)
def test_every_router_works_in_a_command(text: str, printed: str | list[str], run: Path) -> None:
    result = vmoe(*text.format(run=run).split())
    assert result.returncode == 0, result.stderr
    for each in [printed] if isinstance(printed, str) else printed:
        assert each in result.stdout


@pytest.mark.process
@pytest.mark.parametrize(
    ("text", "message"),
    [
        (
            "capacity --checkpoint {run} --budget 0.9x",
            "{run}: block 0: router.kind=switch with router.overflow=drop and router.shares=(): "
            "slots, priorities and k are compared for token_choice and bias_balanced",
        ),
        (
            "mates --checkpoint {run}",
            "{run}: router.kind=switch with router.overflow=drop and router.shares=(): "
            "slots, priorities and k are compared for token_choice and bias_balanced",
        ),
        (
            "convert {run} {out} --format published",
            "block 1 has router gshard: layers of published checkpoints have a gate, no state",
        ),
        (
            "prune {run} {out} --num-experts 2",
            "block 3 has router random, which has no gate: its experts cannot be pruned",
        ),
    ],
    ids=lambda text: text.split()[0],
)
def test_a_command_that_cannot_work_with_a_router_names_it_in_one_line(
    text: str, message: str, run: Path, tmp_path: Path
) -> None:
    result = vmoe(*text.format(run=run, out=tmp_path / "out").split())
    assert result.returncode == 2 and not result.stdout and result.stderr.count("\n") == 1
    assert result.stderr.startswith(f"vmoe: {message.format(run=run)}"), result.stderr


@pytest.mark.process
def test_the_page_of_each_router_has_the_exported_choices_in_the_order_of_their_ranks(
    run: Path, tmp_path: Path
) -> None:
    page, file = tmp_path / "page.html", tmp_path / "routing.safetensors"
    sample = ("--images", "8", "--page-images", "8", "--no-removals")
    result = vmoe("routing", "--checkpoint", run, *sample, "--out", page, "--export", file)
    assert result.returncode == 0, result.stderr
    text, exported = page.read_text(), load_file(file)
    (model,) = json.JSONDecoder().raw_decode(text[text.index('{"summary"') :])[0]["models"]
    fields = (exported[name].swapaxes(0, 1) for name in ("experts", "weights"))
    for block, router, experts, weights in zip(model["blocks"], ROUTERS, *fields, strict=True):
        k = 1 if router == "switch" else 2
        chosen = np.frombuffer(base64.b64decode(block["chosen"]["data"]), "<u2")
        np.testing.assert_array_equal(chosen.reshape(-1, k), experts[:, :k])
        shown = np.frombuffer(base64.b64decode(block["weights"]["data"]), "<f4").reshape(-1, k)
        kept = np.frombuffer(base64.b64decode(block["kept"]["data"]), "u1").reshape(-1, k) > 0
        np.testing.assert_allclose(shown[kept], weights[:, :k][kept], rtol=1e-5)
        normalized = np.allclose(shown.sum(-1), 1)  # whether a choice was dropped or not
        assert normalized == (router in ("gshard", "random", "hash"))
        assert block["drops"] == (router == "bias_balanced")  # it has a priority
        assert (block["topPatches"] is None) == (router in ("random", "hash"))  # without gates
    assert model["grid"] is None
