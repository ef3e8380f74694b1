"""Sparse upcycling: a stored run of the authors' code, and the parent's logits.

``upcycle.npz`` has the dense parameters (``source``), the logits before and after, and the router
and the head of the sparse model, which are not taken from the source.
"""

import json
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax.traverse_util import flatten_dict, unflatten_dict

import vmoe
from tests.published import published_params
from tests.random_models import outputs, random_images, random_params
from vmoe import models
from vmoe.checkpoints.flax_names import published_name
from vmoe.config import (
    BiasBalanced,
    CnnExpert,
    ExpertChoice,
    GatedMlpExpert,
    MlpExpert,
    MoEConfig,
    OptimConfig,
    Soft,
    TokenChoice,
    ViTConfig,
    replace,
)
from vmoe.errors import UsageError
from vmoe.models import params_of
from vmoe.nn.vit import ViT
from vmoe.surgery.resize import fit
from vmoe.surgery.upcycle import logit_changes, upcycle_params, upcycled_layer
from vmoe.train.lr_factors import trained_params

GOLDEN = np.load(Path(__file__).parents[1] / "golden" / "surgery" / "upcycle.npz")
TINY = models.model_config("vit_test", depth=2)
ONE_BLOCK = models.model_config("vit_test", depth=1, pooling="mean")  # pools all tokens


def dense(config: ViTConfig = TINY) -> ViT:
    return models.with_params(config, random_params(config))


def below(prefix: str) -> dict[str, np.ndarray]:
    return {k.removeprefix(prefix): GOLDEN[k] for k in GOLDEN.files if k.startswith(prefix)}


def test_names_copies_and_logits_equal_those_of_the_published_mapping() -> None:
    dense_config = models.model_config("vit_test")
    stored = published_params(dense_config, below("source/"))
    source = models.with_params(dense_config, jax.device_put(stored))
    x = jnp.asarray(GOLDEN["images"])
    np.testing.assert_allclose(outputs(source, x), GOLDEN["logits_dense"], atol=1e-5)
    theirs = below("target_before/")
    moe = MoEConfig(num_experts=4, router=TokenChoice(images_per_group=2))
    target = replace(dense_config, sparse_blocks=(1, 3), moe=moe)
    paths = flatten_dict(params_of(models.build_abstract(target)))
    names = {path: published_name("/".join(map(str, path)), target) for path in paths}
    before = {path: jnp.asarray(theirs[name]) for path, name in names.items() if name in theirs}
    config, params = upcycle_params(
        dense_config, params_of(source), blocks="last2", moe=moe, initial=unflatten_dict(before)
    )
    assert config == target
    params, _ = fit(config, params, config, new_head=True, initial=unflatten_dict(before))

    stored = json.loads(str(GOLDEN["target_leaves"]))
    arrays = flatten_dict(params)
    assert {f"params/{name}" for name in names.values()} == stored.keys()
    for path, name in names.items():
        shape, _, first, origin = stored[f"params/{name}"]
        assert list(arrays[path].shape) == shape
        np.testing.assert_array_equal(np.float32(first), arrays[path].reshape(-1)[:4])
        if "/Moe/Mlp/" in name:
            mlp = GOLDEN[f"source/{name.replace('/Moe/Mlp/', '/Mlp/')}"]
            np.testing.assert_array_equal(arrays[path], np.stack([mlp] * 4))
        else:
            part = "source" if origin == "mapped" else "target_before"
            np.testing.assert_array_equal(arrays[path], GOLDEN[f"{part}/{name}"])
    model = models.with_params(config, params)
    np.testing.assert_allclose(outputs(model, x), GOLDEN["logits_sparse"], atol=1e-5)


@pytest.mark.long_after(2)
@pytest.mark.parametrize(
    "moe",
    [
        dict(),
        dict(num_experts=3, router=dict(k=1)),
        dict(router=dict(capacity_factor=4.0)),  # e / k
        dict(router=dict(k=3, capacity=34, images_per_group=2)),
        dict(num_experts=2, router=TokenChoice(k=2)),  # the gates of all experts sum to 1
    ],
)
def test_an_upcycled_model_has_the_logits_of_its_parent(moe: dict) -> None:
    parent = dense(ONE_BLOCK)
    child = vmoe.upcycle(parent, blocks=(0,), **moe)
    assert logit_changes(ONE_BLOCK, child.config.moe) == []
    x = random_images()
    np.testing.assert_allclose(outputs(child, x), outputs(parent, x), rtol=1e-5, atol=1e-5)


@pytest.mark.long_after(4)
@pytest.mark.parametrize(
    ("moe", "reason"),
    [
        (dict(router=TokenChoice(dropless=True)), "not normalized"),
        (dict(router=dict(capacity_factor=0.5)), "dropped"),
        (dict(router=dict(capacity=8)), "dropped"),
        (dict(noise_std=0.1), "noise"),
        (dict(transfer_dtype="bfloat16"), "bfloat16"),
        (dict(shared_experts=1), "shared expert"),
        (dict(routed_scale=2.5), "routed_scale=2.5"),
        (dict(router=ExpertChoice()), "expert_choice"),
        (dict(router=Soft()), "the experts get mixtures of tokens"),
    ],
)
def test_other_settings_change_the_logits_and_the_reason_is_named(moe: dict, reason: str) -> None:
    parent = dense(ONE_BLOCK)
    child = vmoe.upcycle(parent, blocks=(0,), **moe)
    reasons = logit_changes(ONE_BLOCK, child.config.moe, noise_std=moe.get("noise_std", 0.0))
    assert len(reasons) == 1 and reason in reasons[0]
    x = random_images()
    assert np.max(np.abs(outputs(child, x) - outputs(parent, x))) > 1e-4


def test_experts_are_copies_routers_are_initial_and_the_rest_is_shared() -> None:
    parent = dense()
    child = vmoe.upcycle(parent, blocks="last1", num_experts=4, seed=5)
    assert child.config.sparse_blocks == (1,)
    fresh = jax.jit(lambda: models.build(child.config, seed=5).blocks[1].mlp.gate.kernel[...])()
    before = flatten_dict(params_of(parent))
    for path, value in flatten_dict(params_of(child)).items():
        if "gate" in path:
            np.testing.assert_allclose(value, fresh, rtol=1e-6)
        elif "experts" in path:
            original = before[(*path[:3], *path[4:])]
            np.testing.assert_array_equal(value, np.stack([original] * 4))
        else:
            assert value is before[path]


def test_noise_has_the_given_standard_deviation_relative_to_each_kernel() -> None:
    config = replace(TINY, depth=1, width=64, mlp_dim=256)
    parent = models.with_params(config, random_params(config))
    child = vmoe.upcycle(parent, blocks=(0,), num_experts=4, noise_std=0.1)
    mlp, experts = parent.blocks[0].mlp, child.blocks[0].mlp.experts
    for before, after in [(mlp.up, experts.up), (mlp.down, experts.down)]:
        noise = np.asarray(after.kernel[...]) - np.asarray(before.kernel[...])
        relative = noise.std(axis=(1, 2)) / np.std(before.kernel[...])
        np.testing.assert_allclose(relative, 0.1, rtol=0.03)
        assert abs(np.corrcoef(noise.reshape(4, -1))[0, 1]) < 0.03
        np.testing.assert_array_equal(after.bias[...], np.stack([before.bias[...]] * 4))


@pytest.mark.slow
def test_a_second_upcycling_keeps_the_layers_of_the_first() -> None:
    """The oracles are the first layer's parameters, and the dense parent's logits."""
    parent = dense()
    once = vmoe.upcycle(parent, blocks=(1,), num_experts=2)
    twice = vmoe.upcycle(once, blocks=(0,), num_experts=4)
    assert {i: moe.num_experts for i, moe in twice.config.moe_blocks.items()} == {0: 4, 1: 2}
    first, kept = (params_of(model.blocks[1]) for model in (once, twice))
    jax.tree.map(np.testing.assert_array_equal, kept, first)
    x = random_images()
    np.testing.assert_allclose(outputs(twice, x), outputs(parent, x), rtol=1e-5, atol=1e-5)
    with pytest.raises(UsageError, match="blocks=1: this block is sparse already"):
        vmoe.upcycle(once, blocks=(0, 1))


@pytest.mark.parametrize(
    ("blocks", "message"),
    [
        ("last2", "use every2, or last1 to last1 in a model of 2 blocks"),
        ("all", "use every2, or last1 to last1"),
        ((), "give at least one"),
        ((2,), "blocks=2: use 0 to 1"),
    ],
)
def test_blocks_that_do_not_exist_are_refused(blocks: str | tuple[int, ...], message: str) -> None:
    with pytest.raises(UsageError, match=message):
        vmoe.upcycle(dense(), blocks=blocks)


def test_experts_that_are_no_copies_of_the_mlps_are_refused() -> None:
    for experts in (
        CnnExpert(),
        GatedMlpExpert(),
        MlpExpert(mlp_dim=8),
        MlpExpert(activation="relu"),
    ):
        with pytest.raises(UsageError, match=f"experts.kind={experts.kind}: .* copies of MLPs"):
            vmoe.upcycle(dense(), experts=experts)
    same = vmoe.upcycle(dense(), experts=MlpExpert(activation=TINY.gelu))
    assert same.config.moe.experts.activation == TINY.gelu


def test_experts_have_the_dropout_of_the_mlps_unless_another_is_given() -> None:
    parent = dense(replace(TINY, dropout=0.1))
    assert vmoe.upcycle(parent).config.moe.experts.dropout == 0.1
    assert vmoe.upcycle(parent, experts=dict(dropout=0.0)).config.moe.experts.dropout == 0


@pytest.mark.parametrize("router", [TokenChoice(), BiasBalanced()], ids=lambda x: x.kind)
def test_moments_are_copied_like_the_parameters_and_zero_for_routers(router: Any) -> None:
    """The state of a router has no moments."""
    moe = replace(upcycled_layer(TINY, num_experts=2), router=router)
    config, params = upcycle_params(TINY, random_params(TINY), blocks=(1,), moe=moe)
    zeros = trained_params(OptimConfig(), jax.tree.map(np.zeros_like, params))
    moments = random_params(TINY, seed=1)
    _, sparse = upcycle_params(TINY, moments, blocks=(1,), moe=moe, initial=zeros)
    layer = sparse["blocks"][1]["mlp"]
    np.testing.assert_array_equal(layer["gate"]["kernel"], np.zeros((16, 2)))
    kernel = moments["blocks"][1]["mlp"]["up"]["kernel"]
    np.testing.assert_array_equal(layer["experts"]["up"]["kernel"][1], kernel)
    again, _ = fit(config, sparse, config, initial=zeros)
    assert jax.tree.structure(again) == jax.tree.structure(sparse) == jax.tree.structure(zeros)
