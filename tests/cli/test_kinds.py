"""Options choose the kind of a router, a gate and the experts, and set the fields of that kind."""

import json
from pathlib import Path
from typing import Any

import pytest

from tests.command import TINY, vmoe
from vmoe.config import CosineGate, MoEConfig, TrainConfig, from_json, load, replace, to_json


def moe(*options: str) -> Any:
    """The MoE layer of the config under these options, as JSON."""
    printed = vmoe("config", "--config", TINY, *options).stdout
    assert from_json(TrainConfig, printed)
    return json.loads(printed)["model"]["moe"]


def test_a_kind_has_its_own_options_and_defaults() -> None:
    layer = moe(
        "--model.moe.router.kind", "expert_choice", "--model.moe.router.noise-std", "0.5",
        "--model.moe.gate.kind=cosine", "--model.moe.experts.kind", "gated_mlp",
        "--model.moe.experts.activation", "erf",
    )  # fmt: skip
    assert layer["router"] == {"kind": "expert_choice", "noise_std": 0.5}
    assert layer["gate"]["temperature"] == CosineGate().temperature
    assert layer["experts"] == {"kind": "gated_mlp", "mlp_dim": None, "activation": "erf"}


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
        (["--model.moe.router.kind", "soft"], "model.moe.images_per_group=8: a soft router mixes"),
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
