"""Sparse upcycling: a stored run of the authors' code, the parent's logits, and each start's rule.

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
    CenteredRotary,
    CnnExpert,
    ExpertChoice,
    GatedMlpExpert,
    MlpExpert,
    MoEConfig,
    NoisyGate,
    OptimConfig,
    Soft,
    TokenChoice,
    ViTConfig,
    replace,
)
from vmoe.errors import UsageError
from vmoe.models import params_of
from vmoe.nn.mlp import ACTIVATIONS
from vmoe.nn.vit import ViT
from vmoe.passes import in_batches
from vmoe.surgery import Clusters, Copies, Drop, LowRank, Noise, Split, fit
from vmoe.surgery.upcycle import logit_changes, mlp_inputs, upcycle_params, upcycled_layer
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
        dict(start=Clusters(), images=random_images(32, 3)),
        dict(start=Split(), num_experts=4, router=dict(k=4)),
        dict(start=LowRank(3), router=TokenChoice(capacity_factor=0.5)),  # the routed add zeros
    ],
)
def test_an_upcycled_model_has_the_logits_of_its_parent(moe: dict) -> None:
    parent = dense(ONE_BLOCK)
    child = vmoe.upcycle(parent, blocks=(0,), **moe)
    assert logit_changes(ONE_BLOCK, child.config.moe, moe.get("start", Copies())) == []
    x = random_images()
    np.testing.assert_allclose(outputs(child, x), outputs(parent, x), rtol=1e-5, atol=1e-5)


def test_gated_mlps_become_gated_experts_with_the_logits_of_their_parent() -> None:
    config = replace(
        ONE_BLOCK, mlp="gated", activation="silu", rotary=CenteredRotary(), registers=1
    )
    parent, x = dense(config), random_images()
    split = dict(start=Split(), num_experts=4, router=dict(k=4))
    for moe, mlp_dim in ((dict(), None), (split, config.mlp_dim // 4)):
        child = vmoe.upcycle(parent, blocks=(0,), **moe)
        assert child.config.moe.experts == GatedMlpExpert(activation="silu", mlp_dim=mlp_dim)
        np.testing.assert_allclose(outputs(child, x), outputs(parent, x), rtol=1e-5, atol=1e-5)
    with pytest.raises(
        UsageError, match=r"model.mlp=gated: LowRank makes .* use the start copies or"
    ):
        vmoe.upcycle(parent, blocks=(0,), start=LowRank())
    low_rank = MoEConfig(experts=GatedMlpExpert("gated_mlp", mlp_dim=8), shared_experts=1)
    params = models.params_of(parent)
    with pytest.raises(UsageError, match="model.mlp=gated: LowRank makes experts of MLPs that are"):
        upcycle_params(config, params, blocks=(0,), moe=low_rank, start=LowRank(8))
    with pytest.raises(
        UsageError, match=r"model.mlp=gated_norm: .* plain or gated; use vmoe.moefy"
    ):
        upcycled_layer(replace(config, mlp="gated_norm"), num_experts=0)


@pytest.mark.long_after(4)
@pytest.mark.parametrize(
    ("moe", "reason"),
    [
        (dict(router=TokenChoice(dropless=True)), "not normalized"),
        (dict(router=dict(capacity_factor=0.5)), "dropped"),
        (dict(router=dict(capacity=8)), "dropped"),
        (dict(start=Noise(0.1)), "noise"),
        (dict(start=Drop(0.1)), "re-initialized (drop_ratio=0.1)"),
        (dict(start=Split(), num_experts=4), "a token uses 2 of the 4 groups"),
        (dict(start=LowRank(), shared_gate=True), "a new gate"),
        (dict(exchange=dict(dtype="bfloat16")), "bfloat16"),
        (dict(shared_experts=1), "shared expert"),
        (dict(routed_scale=2.5), "routed_scale=2.5"),
        (dict(router=ExpertChoice()), "expert_choice"),
        (dict(router=Soft()), "the experts get mixtures of tokens"),
    ],
)
def test_other_settings_change_the_logits_and_the_reason_is_named(moe: dict, reason: str) -> None:
    parent = dense(ONE_BLOCK)
    child = vmoe.upcycle(parent, blocks=(0,), **moe)
    reasons = logit_changes(ONE_BLOCK, child.config.moe, moe.get("start", Copies()))
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
    child = vmoe.upcycle(parent, blocks=(0,), num_experts=4, start=Noise(0.1))
    mlp, experts = parent.blocks[0].mlp, child.blocks[0].mlp.experts
    for before, after in [(mlp.up, experts.up), (mlp.down, experts.down)]:
        noise = np.asarray(after.kernel[...]) - np.asarray(before.kernel[...])
        relative = noise.std(axis=(1, 2)) / np.std(before.kernel[...])
        np.testing.assert_allclose(relative, 0.1, rtol=0.03)
        assert abs(np.corrcoef(noise.reshape(4, -1))[0, 1]) < 0.03
        np.testing.assert_array_equal(after.bias[...], np.stack([before.bias[...]] * 4))


@pytest.mark.parametrize("kind", ["plain", "gated"])
def test_dropped_units_get_the_mean_and_standard_deviation_of_those_they_replace(kind: str) -> None:
    config = replace(TINY, depth=1, width=64, mlp_dim=250, mlp=kind)
    mlp = random_params(config)["blocks"][0]["mlp"]
    mlp["up"]["kernel"] += 2.0
    moe = upcycled_layer(config, Drop(0.3), num_experts=3)
    experts = Drop(0.3).params(mlp, moe, jax.random.key(0), None)["experts"]
    kernels = [("up", 1, slice(i, i + 250)) for i in range(0, mlp["up"]["kernel"].shape[1], 250)]
    chosen = []
    for name, axis, part in [*kernels, ("down", 0, slice(None))]:
        old = np.moveaxis(np.asarray(mlp[name]["kernel"][:, part]), axis, 0)
        for kernel in np.asarray(experts[name]["kernel"][..., part]):
            new = np.moveaxis(kernel, axis, 0)
            differs = (new != old).any(-1)
            assert differs.sum() == int(0.3 * 250) and (new != old)[differs].all()
            for statistic in (np.mean, np.std):
                expected = statistic(old[differs])
                np.testing.assert_allclose(statistic(new[differs]), expected, atol=0.02)
            chosen.append(differs)
        bias = mlp[name]["bias"]
        np.testing.assert_array_equal(experts[name]["bias"], np.stack([bias] * 3))
    assert len(chosen) == 3 * (2 if kind == "plain" else 3)
    assert len(np.unique(chosen, axis=0)) == len(chosen)  # each kernel has units of its own


@pytest.mark.parametrize("kind", ["plain", "gated"])
def test_split_experts_add_the_hidden_units_nearest_in_direction(kind: str) -> None:
    """The oracle is the parent's MLP with the units of the chosen experts alone."""
    parent = dense(replace(ONE_BLOCK, mlp=kind))
    layer = vmoe.upcycle(parent, blocks=(0,), num_experts=4, start=Split()).blocks[0].mlp
    mlp = jax.tree.map(np.float64, params_of(parent.blocks[0].mlp))
    up, down = mlp["up"], mlp["down"]
    f = len(down["kernel"])
    by_unit = {tuple(np.float32(column)): i for i, column in enumerate(down["kernel"])}
    parts = np.asarray(layer.experts.down.kernel[...])
    units = np.array([[by_unit[tuple(row)] for row in part] for part in parts])
    assert sorted(units.flat) == list(range(f)) and units.shape == (4, f // 4)
    directions = up["kernel"].T[:f] / np.linalg.norm(up["kernel"].T[:f], axis=1, keepdims=True)
    means = directions[units].mean(1)
    columns = means / np.linalg.norm(means, axis=1, keepdims=True)
    np.testing.assert_allclose(layer.gate.kernel[...].T, columns, atol=1e-6)
    for i, j in np.ndindex(4, 4):  # no two units gain by changing places
        gains = directions @ (means[j] - means[i])
        assert gains[units[i]].max() <= gains[units[j]].min() + 1e-6

    tokens = np.random.default_rng(0).standard_normal((5, ONE_BLOCK.width)).astype(np.float32)
    hidden = tokens @ up["kernel"] + up["bias"]
    active = np.asarray(ACTIVATIONS[ONE_BLOCK.activation](hidden[:, :f]))
    active = active if kind == "plain" else active * hidden[:, f:]
    expected = []
    for row, logits in zip(active, tokens @ columns.T, strict=True):
        chosen = np.argsort(-logits)[:2]
        weights = 2 * np.exp(logits[chosen]) / np.exp(logits[chosen]).sum()
        outputs = [row[units[i]] @ down["kernel"][units[i]] for i in chosen]
        expected.append(weights @ outputs + down["bias"])
    np.testing.assert_allclose(layer(jnp.asarray(tokens[None]))[0], expected, rtol=1e-4, atol=1e-4)


def test_the_router_of_clusters_has_the_mean_directions_of_its_tokens_as_columns() -> None:
    parent, images = dense(replace(TINY, rotary=CenteredRotary())), random_images(32, 6)
    names = ["blocks.1.mlp"]
    captured = vmoe.analysis.capture_features(parent, jnp.asarray(images), names).features
    rows = mlp_inputs(parent, in_batches(images, batch_size=4), (1,))[1]
    mlp = parent.blocks[1].mlp
    expected = np.asarray(captured["blocks.1.mlp"]).reshape(rows.shape)
    np.testing.assert_allclose(mlp(jnp.asarray(rows)), expected, rtol=1e-4, atol=1e-4)

    sample = mlp_inputs(parent, in_batches(images, batch_size=4), (1,), most=50)[1]
    places = [np.flatnonzero((rows == row).all(1)) for row in sample]
    assert len(places) == 50 and (np.diff(np.concatenate(places)) > 0).all()  # in their order
    assert min(places) < len(rows) / 3 and max(places) >= len(rows) * 2 / 3  # of both batches

    child = vmoe.upcycle(parent, blocks=(1,), num_experts=3, start=Clusters(), images=images)
    columns = np.asarray(child.blocks[1].mlp.gate.kernel[...]).T
    rows = rows / np.linalg.norm(rows, axis=1, keepdims=True)
    nearest = (rows @ columns.T).argmax(1)
    for expert, column in enumerate(columns):
        mean = rows[nearest == expert].mean(0)
        np.testing.assert_allclose(column, mean / np.linalg.norm(mean), atol=1e-5)


def test_low_rank_experts_stand_beside_the_mlp_in_a_saved_model(tmp_path: Path) -> None:
    parent = dense()
    child = vmoe.upcycle(parent, blocks=(1,), num_experts=3, start=LowRank(2))
    names = [str(i) for i in range(TINY.num_classes)]
    vmoe.save(child, tmp_path / "saved", class_names=names)
    layer = vmoe.load(tmp_path / "saved").model.blocks[1].mlp
    before, d, f = params_of(parent.blocks[1].mlp), TINY.width, TINY.mlp_dim
    shapes = jax.tree.map(np.shape, params_of(layer.experts))
    assert shapes["up"] == {"kernel": (3, d, 2), "bias": (3, 2)}
    assert shapes["down"] == {"kernel": (3, 2, d), "bias": (3, d)}
    assert layer.shared.up.kernel.shape == (1, d, f)
    shared = jax.tree.map(lambda x: x[0], params_of(layer.shared))
    jax.tree.map(np.testing.assert_array_equal, shared, before)
    assert 0 < np.abs(layer.experts.up.kernel[...]).max() <= d**-0.5
    assert not np.any(layer.experts.down.kernel[...])


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
    same = vmoe.upcycle(dense(), experts=MlpExpert(activation=TINY.activation))
    assert same.config.moe.experts.activation == TINY.activation


@pytest.mark.parametrize(
    ("moe", "message"),
    [
        (dict(start=Split(), num_experts=3), "num_experts=3: use a divisor of the hidden width"),
        (dict(start=Split(), experts=GatedMlpExpert()), "groups of hidden units .* use mlp, with"),
        (dict(start=Split(), routed_scale=1.0), "routed_scale=1.0: use k"),
        (dict(start=Split(), gate=NoisyGate()), "gate.kind=noisy: .* a linear gate"),
        (dict(start=Drop(0.001)), "drop_ratio=0.001: no hidden unit of 32 is re-init"),
        (dict(start=LowRank(4), shared_experts=2), "shared_experts=2: the shared expert is the"),
        (dict(start=LowRank(4), experts=MlpExpert(mlp_dim=8)), "with hidden width 4"),
        (dict(start=Clusters()), "start clusters reads tokens: give images"),
        (dict(start=Copies(), images=random_images()), "Copies reads no images: leave them out"),
        (
            dict(start=Clusters(), images=random_images(32, 1), num_experts=99),
            "17 tokens cannot make 99 clusters: give more images",
        ),
    ],
)
def test_what_does_not_fit_a_start_is_refused(moe: dict, message: str) -> None:
    with pytest.raises(UsageError, match=message):
        vmoe.upcycle(dense(), blocks=(0,), **moe)


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
