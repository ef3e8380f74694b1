"""Commands on a model of every router, every gate and every kind of expert, at tiny size.

A command works, or refuses the model in one line that names the reason. The arithmetic of each kind
is tested elsewhere; here reports are compared with the exported routing, and files with the model.
"""

import json
from collections.abc import Collection
from pathlib import Path
from typing import Any, NoReturn

import jax
import jax.export
import numpy as np
import pytest
from safetensors.numpy import load_file

from tests.command import vmoe
from tests.random_models import model_of, outputs, random_images, stored_of
from vmoe.checkpoints import StoredModel, read, write
from vmoe.config import (
    AttentionExpert,
    BiasBalanced,
    CnnExpert,
    ConstantExpert,
    CosineGate,
    ExpertChoice,
    ExpertList,
    ExpertRace,
    GatedMlpExpert,
    GShard,
    Hash,
    IdentityExpert,
    MlpExpert,
    MlpGate,
    MoEConfig,
    NoisyGate,
    Random,
    ReLU,
    RoutingOverrides,
    Sinkhorn,
    Soft,
    Switch,
    TopP,
    Transport,
    TransportExpertChoice,
    ViTConfig,
    ZeroExpert,
    replace,
)
from vmoe.studies.routing.figures import plots_of
from vmoe.trees import by_name

IMAGES = 8
ROUTERS = (
    ExpertChoice(),
    Soft(),
    Switch(),
    GShard(),
    BiasBalanced(),
    Sinkhorn(),
    Transport(),
    TransportExpertChoice(),
    ExpertRace(),
    ReLU(),
    TopP(),
    Random(),
    Hash(),
)
EVERY = ExpertList(
    each=(
        *(MlpExpert(), GatedMlpExpert(), CnnExpert(), AttentionExpert()),
        *(IdentityExpert(), ZeroExpert(), ConstantExpert()),
    )
)
MODELS: dict[str, dict[str, Any]] = {
    **{router.kind: dict(router=router) for router in ROUTERS},
    "top_p": dict(router=TopP(), gate=MlpGate()),
    "bias_balanced": dict(router=BiasBalanced(), gate=NoisyGate()),
    "experts": dict(
        router=BiasBalanced(), experts=EVERY, num_experts=7, shared_experts=2, gate=CosineGate()
    ),
}
"""The layer of each model, in its only block; gates are with routers, on which they do not depend.
The other tests of each command have token choice with a linear gate and MLPs."""
WITH_PLOTS = {"expert_choice", "top_p", "transport", "random", "soft"}
"""One router of each form of routing with each set of figures, which are drawn from these forms;
tests/studies/test_analysis_commands.py has all figures, of token choice."""
OF_EACH_FORM = {*WITH_PLOTS, "experts"}
"""The removal and pruning of experts and attacks depend on these forms, a router's state and the
experts; the last of them has both. Pruning also changes the state of ``bias_balanced``."""

NOT_COMPARABLE = "router.kind={} with router.overflow=drop and router.shares=(): slots"
NO_GATE = "block 0 has router {}, which has no gate: its experts cannot be pruned, added or merged"
SLOTS = "block 0 has router soft, whose slots are trained together: its experts cannot be pruned"
LISTS = "block 0 has experts list, which are of different kinds: they cannot be pruned, added,"
UNSTORED = "block 0 has router {}: layers of published checkpoints have a gate, no state, and"
FREE = ("expert_race", "relu", "top_p")
BY_EXPERT = ("expert_choice", "transport_expert_choice")
REFUSED = {
    "capacity": {
        **dict.fromkeys(("switch", "gshard", "soft", *BY_EXPERT, *FREE), NOT_COMPARABLE),
        **dict.fromkeys(("sinkhorn", "random", "hash", "transport"), NOT_COMPARABLE),
    },
    "mates": {
        **dict.fromkeys(BY_EXPERT, "router {} drops no choice that others take: no mate can"),
        "soft": "router {} routes each image alone: no mate can attack",
        **dict.fromkeys(("switch", "gshard", "sinkhorn", "transport", *FREE), NOT_COMPARABLE),
        **dict.fromkeys(("random", "hash"), "router {} reads no pixels: no mate can attack"),
    },
    "prune": {
        "soft": SLOTS,
        **dict.fromkeys(("random", "hash"), NO_GATE),
        "experts": LISTS,
    },
    "prune --rule average": {
        "soft": SLOTS,
        "experts": LISTS,
    },
    "convert --format published": {
        **dict.fromkeys(("gshard", "bias_balanced", *FREE, "random", "hash"), UNSTORED),
        "experts": UNSTORED.format("bias_balanced"),
    },
}
"""By command and model, a part of the message of a refusal; in all other cases it works."""


def config_of(name: str) -> ViTConfig:
    """A model whose only block is sparse; its layer lacks slots."""
    layer = MoEConfig(**(dict(num_experts=3) | MODELS[name]))
    scarce = dict(capacity_factor=0.7, capacity_multiple=1, images_per_group=4)
    layer = replace(layer, router={x: scarce[x] for x in scarce if layer.router.has(x)})
    size = dict(patch_size=4, width=8, mlp_dim=8, num_heads=1, image_size=8, num_classes=10)
    return ViTConfig(**size, depth=1, pooling="mean", sparse_blocks=(0,), moe=layer)


def not_finite(constant: str) -> NoReturn:
    raise AssertionError(f"{constant} in a report")


def parsed(text: str) -> Any:
    return json.loads(text, parse_constant=not_finite)


def check_routing(report: Any, folder: Path, config: ViTConfig) -> None:
    """The report and the page have the shares of the exported decisions."""
    exported = load_file(folder / "routing.safetensors")
    text = (folder / "page.html").read_text()
    decoder = json.JSONDecoder(parse_constant=not_finite)
    (shown,) = decoder.raw_decode(text[text.index('{"summary"') :])[0]["models"]
    assert np.isfinite(exported["logits"]).all()
    for i, moe in config.moe_blocks.items():
        own, block = report["blocks"][str(i)], shown["blocks"][i]
        experts, positions, gates, weights = (
            exported[name][:, i] for name in ("experts", "positions", "gates", "weights")
        )
        assert np.isfinite(weights).all() and len(gates) == IMAGES * 4
        np.testing.assert_allclose(gates.sum(-1), 1, rtol=1e-5)
        np.testing.assert_allclose(own["importance"], gates.mean(0), rtol=1e-4)
        chosen, kept = experts >= 0, positions >= 0
        by_tokens = moe.router.logits_per != "slot"
        dropped = (chosen & ~kept).sum() / max(1, chosen.sum())
        assert own["dropped"] == pytest.approx(dropped, abs=1e-6)
        assert own["unprocessed"] == pytest.approx((~kept.any(-1)).mean() * by_tokens, abs=1e-6)
        load = np.bincount(experts[chosen], minlength=moe.num_experts) / max(1, chosen.sum())
        np.testing.assert_allclose(own["load"], load if by_tokens else gates.mean(0), rtol=1e-4)
        assert block["dropped"] == pytest.approx(dropped, abs=1e-4)
        assert (block["topPatches"] is None) == (not moe.router.learned)
        assert ("shared experts" in block["about"]) == bool(moe.shared_experts)
        assert ("zero expert" in block["about"]) == (ZeroExpert() in moe.experts.members)


def check_program(folder: Path, stored: StoredModel) -> None:
    """The exported program has the logits of the model with one image per group."""
    program = jax.export.deserialize(bytearray((folder / "model.jaxexport").read_bytes()))
    params, images = load_file(folder / "model.safetensors"), random_images(8)
    alone = RoutingOverrides(images_per_group=1).apply(stored.config)
    expected = outputs(model_of(stored._replace(config=alone)), images)
    logits = jax.jit(program.call)(params, images)
    np.testing.assert_allclose(logits, expected, rtol=1e-4, atol=1e-4)


def check_written(folder: Path, stored: StoredModel, done: Collection[str]) -> None:
    """The files of the commands that worked have the parameters and layers that they promise."""
    blocks = stored.config.sparse_blocks
    assert read(folder / "upcycled").config.sparse_blocks == (*blocks, len(blocks))
    if "prune" in done:
        layers = read(folder / "pruned").config.moe_blocks.values()
        assert [moe.num_experts for moe in layers] == [2] * len(blocks)
    if "prune --rule average" in done:
        assert read(folder / "dense").config.sparse_blocks == ()
    for text, name in (("vmoe", "copy"), ("published", "published")):
        if f"convert --format {text}" in done:
            copied = by_name(read(folder / name).params)
            for path, array in by_name(stored.params).items():
                np.testing.assert_array_equal(copied[path], array)


@pytest.mark.slow
@pytest.mark.parametrize("name", MODELS)
def test_every_command_works_on_a_model_or_names_the_reason_in_one_line(
    name: str, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    config = config_of(name)
    stored = stored_of(config)._replace(class_names=tuple("0123456789"))
    write(stored, tmp_path / "model", format="vmoe")
    write(stored_of(replace(config, depth=2)), tmp_path / "with_dense", format="vmoe")
    data = ("--data", "digits:test", "--batch-size", "4", "--json")
    sample = ("--checkpoint", "model", *data, "--images", str(IMAGES))
    page = ("--out", "page.html", "--page-images", "4", "--export", "routing.safetensors")
    mates = "--victims 2 --draws 2 --capacity-factor .5 --priority order"
    commands = {
        "routing": (*sample, *page),
        "capacity": (*sample, "--budget", "0.99x", "--out", "routing.json"),
        "upcycle": ("with_dense", "upcycled", "--blocks", "1", "--num-experts", "2"),
        "convert --format published": ("model", "published"),
        "convert --format jax": ("model", "jax"),
        "convert --format vmoe": ("model", "copy"),
    }
    if name in WITH_PLOTS:
        commands["routing"] += ("--plots", "plots")
    if name in OF_EACH_FORM | {"bias_balanced"} | REFUSED["prune"].keys():
        commands["prune"] = ("model", "pruned", "--num-experts", "2", *data)
        commands["prune --rule average"] = ("model", "dense", "--num-experts", "0", *data)
    if name in OF_EACH_FORM:
        commands["attack"] = (*sample, "--steps", "1", "--epsilon", "8")
    else:
        commands["routing"] += ("--no-removals",)
    if name != "experts":  # what follows depends on the router
        commands["mates"] = (*sample, "--steps", "1", *mates.split())
    reports = {}
    for text, arguments in commands.items():
        capfd.readouterr()
        result = vmoe(*text.split(), *arguments, cwd=tmp_path)
        out, error = result.stdout, result.stderr
        reason = REFUSED.get(text, {}).get(name)
        assert result.returncode == (2 if reason else 0), f"{text}: {error}"
        if reason:
            assert not out and error.count("\n") == 1, error
            assert error.startswith("vmoe: ") and reason.format(name) in error, error
            assert capfd.readouterr() == ("", "")  # no library prints past Python's streams
        else:
            assert "nan" not in out.lower()
            reports[text] = parsed(out) if "--json" in arguments else out
    check_routing(reports["routing"], tmp_path, config)
    check_program(tmp_path / "jax", stored)
    check_written(tmp_path, stored, reports)
    if "--plots" in commands["routing"]:
        assert {file.stem for file in (tmp_path / "plots").iterdir()} == plots_of(config).keys()


def test_the_published_format_has_no_other_gates_and_no_shared_experts(tmp_path: Path) -> None:
    for fields, reason in (
        *(
            (dict(gate=gate), f"gate.kind={gate.kind} with block=0: published checkpoints have no")
            for gate in (NoisyGate(), MlpGate(), CosineGate())
        ),
        (
            dict(shared_experts=2),
            "moe.shared_experts=2 with block=0: published checkpoints have no",
        ),
    ):
        stored = stored_of(replace(config_of("switch"), moe=fields))
        path = write(stored, tmp_path / reason.split()[0], format="vmoe")
        result = vmoe("convert", path, "published", "--format", "published", cwd=tmp_path)
        assert result.returncode == 2 and reason in result.stderr, result.stderr
