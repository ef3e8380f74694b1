"""Experts pruned, added, merged and averaged; the oracles are the parent's logits and arrays."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests.random_models import forward, random_images, random_params
from tests.routers import grouped
from vmoe import models
from vmoe.config import (
    BiasBalanced,
    CnnExpert,
    CosineGate,
    Exchange,
    ExpertChoice,
    ExpertList,
    GatedMlpExpert,
    Hash,
    MlpExpert,
    MlpGate,
    MoEConfig,
    NoisyGate,
    Router,
    Soft,
    TokenChoice,
    ViTConfig,
    ZeroExpert,
    replace,
)
from vmoe.config.gates import Gate
from vmoe.errors import UsageError
from vmoe.surgery.experts import (
    add_experts,
    average_experts,
    largest_router_change,
    merge_experts,
    most_loaded,
    prune_experts,
    random_experts,
)
from vmoe.surgery.params import shapes
from vmoe.surgery.upcycle import upcycle_params, upcycled_layer

E = 4
CONFIG = models.model_config(
    "vit_test",
    depth=2,
    sparse_blocks=(0, 1),
    moe=MoEConfig(num_experts=E, router=TokenChoice(normalize_weights=True, dropless=True)),
)
FIRST = replace(CONFIG, sparse_blocks=(0,))


def layer(params: dict[Any, Any], block: int) -> dict[Any, Any]:
    return params["blocks"][block]["mlp"]


def logits(config: ViTConfig, params: dict[Any, Any]) -> jax.Array:
    return forward(models.with_params(config, params), random_images())[0]


def assert_equal(left: Any, right: Any) -> None:
    jax.tree.map(np.testing.assert_array_equal, left, right)


@pytest.mark.long_after(1)
@pytest.mark.parametrize("router", [TokenChoice(k=1), ExpertChoice()])
def test_pruning_keeps_the_parameters_and_router_columns_of_the_kept_experts(router: Any) -> None:
    config = replace(CONFIG, moe=MoEConfig(num_experts=E, router=router))
    params = random_params(config)
    pruned_config, pruned = prune_experts(config, params, {1: (3, 1)})
    assert [moe.num_experts for moe in pruned_config.moe] == [E, 2]
    before, after = layer(params, 1), layer(pruned, 1)
    assert_equal(after["experts"], jax.tree.map(lambda x: x[jnp.array([3, 1])], before["experts"]))
    np.testing.assert_array_equal(after["gate"]["kernel"], before["gate"]["kernel"][:, [3, 1]])
    assert_equal(layer(pruned, 0), layer(params, 0))
    assert {path: x.shape for path, x in _flat(pruned).items()} == shapes(pruned_config)


def _flat(tree: dict[Any, Any]) -> dict[Any, Any]:
    return {tuple(key.key for key in path): leaf for path, leaf in jax.tree.leaves_with_path(tree)}


def test_pruning_experts_without_load_keeps_the_logits() -> None:
    params = random_params(FIRST)
    # The first feature is always large, and lowers the logits of experts 0 and 2.
    norm, router = params["blocks"][0]["norm2"], layer(params, 0)["gate"]
    norm["bias"] = norm["bias"].at[0].set(30.0)
    router["kernel"] = router["kernel"].at[0].set(jnp.array([-1.0, 1.0, -1.0, 1.0]))
    before, records = forward(models.with_params(FIRST, params), random_images())
    loads = {
        block: np.bincount(np.asarray(record.routing.experts).ravel(), minlength=E)
        for block, record in records.items()
    }
    kept = most_loaded(loads, 2)
    assert kept == {0: (1, 3)}
    config, pruned = prune_experts(FIRST, params, kept)
    assert config.moe == replace(FIRST.moe, num_experts=2)
    np.testing.assert_allclose(logits(config, pruned), before, rtol=1e-5, atol=1e-5)


def test_random_experts_depend_on_the_seed_and_the_block_alone() -> None:
    config = replace(CONFIG, moe=dict(num_experts=64))
    kept = random_experts(config, 16, seed=1)
    assert kept == random_experts(config, 16, seed=1) != random_experts(config, 16, seed=2)
    assert kept[0] != kept[1]
    assert all(
        len(set(experts)) == 16 and list(experts) == sorted(experts) for experts in kept.values()
    )


def test_experts_whose_router_vectors_grew_least_are_pruned() -> None:
    """Norms before 1, 1, 2, 1 and after 1.5, 0.2, 2.4, 1: changes 0.5, -0.8, 0.4, 0."""
    config = replace(CONFIG, sparse_blocks=(1,))
    earlier, params = random_params(config), random_params(config)
    kernel = jnp.zeros((16, E))
    layer(earlier, 1)["gate"]["kernel"] = kernel.at[3].set(jnp.array([1.0, -1.0, 2.0, 1.0]))
    layer(params, 1)["gate"]["kernel"] = kernel.at[5].set(jnp.array([1.5, 0.2, -2.4, 1.0]))
    assert largest_router_change(config, params, earlier, 3) == {1: (0, 2, 3)}
    assert largest_router_change(config, params, earlier, 1) == {1: (0,)}
    with pytest.raises(UsageError, match="block 1: the earlier parameters have no router"):
        largest_router_change(config, params, random_params(replace(config, sparse_blocks=())), 1)


def test_fewer_experts_have_more_slots_at_the_same_capacity_factor() -> None:
    config = replace(CONFIG, moe=MoEConfig(num_experts=E, router=TokenChoice(capacity_factor=1.0)))
    pruned, _ = prune_experts(config, random_params(config), {0: (0, 1), 1: (2, 3)})
    assert (config.moe.slots(32), pruned.moe.slots(32)) == (16, 32)


@pytest.mark.long_after(1)
@pytest.mark.parametrize(
    "router",
    [TokenChoice(), TokenChoice(normalize_weights=True), BiasBalanced(normalize_weights=True)],
)
def test_copies_of_all_experts_with_twice_the_k_keep_the_logits(router: Router) -> None:
    config = replace(FIRST, moe=dict(router=router))
    params = random_params(config)
    doubled, more = add_experts(config, params, {0: range(E)}, k=4)
    assert (doubled.moe.num_experts, doubled.moe.router.k) == (2 * E, 4)
    before = logits(config, params)
    np.testing.assert_allclose(logits(doubled, more), before, rtol=1e-5, atol=1e-5)


def test_merging_copies_gives_back_the_parameters_they_were_copied_from() -> None:
    params = random_params(CONFIG)
    config, more = add_experts(CONFIG, params, {0: range(E), 1: range(E)})
    pairs = [(i, E + i) for i in range(E)]
    merged_config, merged = merge_experts(config, more, {0: pairs, 1: pairs})
    assert merged_config == CONFIG
    assert_equal(merged, params)


def test_merged_experts_are_the_means_of_their_groups() -> None:
    params = random_params(CONFIG)
    config, merged = merge_experts(CONFIG, params, {1: [(2,), (0, 1, 3)]})
    before, after = layer(params, 1), layer(merged, 1)
    for part in ("up", "down"):
        old, new = (np.asarray(x["experts"][part]["kernel"]) for x in (before, after))
        np.testing.assert_array_equal(new[0], old[2])
        np.testing.assert_allclose(new[1], old[[0, 1, 3]].mean(0), rtol=1e-5, atol=1e-6)
    old, new = (np.asarray(x["gate"]["kernel"]) for x in (before, after))
    np.testing.assert_allclose(new[:, 1], old[:, [0, 1, 3]].mean(1), rtol=1e-5, atol=1e-6)
    assert config.moe_of(1).num_experts == 2 and config.moe_of(0).num_experts == E


def test_noise_and_new_router_columns_are_those_of_the_copies_only() -> None:
    config = replace(CONFIG, width=64, mlp_dim=128)
    params = random_params(config)
    new_config, more = add_experts(
        config, params, {1: (2, 2)}, new_columns=True, noise_std=0.1, seed=7
    )
    before, after = layer(params, 1), layer(more, 1)
    assert_equal(jax.tree.map(lambda x: x[:E], after["experts"]), before["experts"])
    kernel = np.asarray(after["experts"]["up"]["kernel"])
    noise = kernel[E:] - kernel[2]
    np.testing.assert_allclose(noise.std(axis=(1, 2)) / kernel[2].std(), 0.1, rtol=0.05)
    assert (noise[0] != noise[1]).any()
    bias = after["experts"]["up"]["bias"]
    np.testing.assert_array_equal(bias[E:], jnp.stack([bias[2]] * 2))
    router = after["gate"]["kernel"]
    np.testing.assert_array_equal(router[:, :E], before["gate"]["kernel"])
    fresh = jax.jit(lambda: models.build(new_config, seed=7).blocks[1].mlp.gate.kernel[...])()
    np.testing.assert_allclose(router[:, E:], fresh[:, E:], rtol=1e-6)


def test_the_average_of_upcycled_experts_is_the_dense_model() -> None:
    dense = models.model_config("vit_test", depth=2)
    params = random_params(dense)
    moe = upcycled_layer(dense, num_experts=4)
    config, sparse = upcycle_params(dense, params, blocks=(0, 1), moe=moe)
    back, averaged = average_experts(config, sparse)
    assert back == dense
    assert_equal(averaged, params)
    half, _ = average_experts(config, sparse, blocks=[0])
    assert half.moe_blocks == {1: moe}


def test_moments_follow_the_experts_of_the_parameters() -> None:
    params, moments = random_params(CONFIG), random_params(CONFIG, seed=1)
    kept = largest_router_change(CONFIG, params, random_params(CONFIG, seed=2), 3)
    config, _ = prune_experts(CONFIG, params, kept)
    _, pruned = prune_experts(CONFIG, moments, kept)
    for block, experts in kept.items():
        bias = layer(moments, block)["experts"]["up"]["bias"]
        np.testing.assert_array_equal(
            layer(pruned, block)["experts"]["up"]["bias"], bias[jnp.array(experts)]
        )
    assert config.moe.num_experts == 3


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            lambda c, p: prune_experts(c, p, {1: (0,)}),
            "k=2 with model.moe.num_experts=1: lower k",
        ),
        (
            lambda c, p: prune_experts(c, p, {2: (0, 1)}),
            r"block 2 is not sparse: choose from \(0, 1",
        ),
        (lambda c, p: prune_experts(c, p, {1: (0, 4)}), "block 1 has no expert 4"),
        (lambda c, p: prune_experts(c, p, {1: (0, 0)}), "block 1: an expert is kept twice"),
        (lambda c, p: random_experts(c, 5), "block 0: cannot keep 5 of 4 experts"),
        (lambda c, p: most_loaded({1: np.ones(4)}, 0), "block 1: cannot keep 0 of 4 experts"),
        (lambda c, p: add_experts(c, p, {1: (-1,)}), "block 1 has no expert -1"),
        (lambda c, p: merge_experts(c, p, {1: [(0, 1), (2,)]}), "each of its 4 experts once"),
        (lambda c, p: merge_experts(c, p, {1: [(0, 1), (1, 2, 3)]}), "each of its 4 experts once"),
        (lambda c, p: average_experts(c, p, [5]), "block 5 is not sparse"),
    ],
)
def test_what_is_not_possible_is_refused(change: Any, message: str) -> None:
    with pytest.raises(UsageError, match=message):
        change(CONFIG, random_params(CONFIG))


def test_one_expert_is_left_if_k_is_lowered_too() -> None:
    config, _ = prune_experts(CONFIG, random_params(CONFIG), {0: (0,), 1: (2,)}, k=1)
    assert (config.moe.num_experts, config.moe.router.k) == (1, 1)


def test_k_is_refused_for_a_router_without_one() -> None:
    config = replace(CONFIG, moe=MoEConfig(num_experts=E, router=ExpertChoice()))
    with pytest.raises(UsageError, match="k=1: router expert_choice has no experts per token"):
        prune_experts(config, random_params(config), {1: (0, 1)}, k=1)


@pytest.mark.parametrize(
    ("router", "message"),
    [
        (Soft(), "has router soft, whose slots are trained together"),
        (Hash(), "has router hash, which has no gate"),
    ],
)
def test_experts_of_a_router_without_a_gate_per_expert_are_refused(
    router: Router, message: str
) -> None:
    config = replace(CONFIG, moe=MoEConfig(num_experts=E, router=grouped(router, 1)))
    params = random_params(config)
    for change in (
        lambda: prune_experts(config, params, {1: (0,)}),
        lambda: add_experts(config, params, {1: (0,)}),
        lambda: merge_experts(config, params, {1: [range(E)]}),
        lambda: largest_router_change(config, params, params, 2),
    ):
        with pytest.raises(UsageError, match=message):
            change()


@pytest.mark.long_after(1)
@pytest.mark.parametrize("gate", [NoisyGate(), MlpGate(hidden_dim=3)], ids=lambda gate: gate.kind)
def test_experts_of_one_kind_are_pruned_merged_and_added_with_the_columns_of_their_gate(
    gate: Gate,
) -> None:
    config = replace(CONFIG, moe=dict(experts=CnnExpert(), gate=gate))
    params = random_params(config)
    pruned_config, pruned = prune_experts(config, params, {0: (3, 1)})
    assert {path: x.shape for path, x in _flat(pruned).items()} == shapes(pruned_config)
    before, after = (layer(p, 0)["gate"] for p in (params, pruned))
    for name in before:
        array = np.asarray(before[name])
        kept = array[:, [3, 1]] if name in gate.columns else array
        np.testing.assert_array_equal(after[name], kept)
    merged_config, merged = merge_experts(config, params, {0: [(0, 2), (1, 3)]})
    assert {path: x.shape for path, x in _flat(merged).items()} == shapes(merged_config)
    more_config, more = add_experts(config, params, {0: (2,)}, new_columns=True, seed=7)
    fresh = jax.jit(lambda: models.params_of(models.build(more_config, seed=7)))()
    new, added = (layer(p, 0)["gate"] for p in (fresh, more))
    for name in before:
        array = np.asarray(before[name])
        want = np.append(array, new[name][:, E:], 1) if name in gate.columns else array
        np.testing.assert_array_equal(added[name], want)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        (
            {"experts": ExpertList(each=(MlpExpert(), ZeroExpert()) * 2)},
            "has experts list, which are",
        ),
        ({"gate": CosineGate()}, "has gate cosine, whose parameters are not one column"),
    ],
    ids=["list", "gate"],
)
def test_experts_that_cannot_be_told_apart_by_their_arrays_are_refused(
    fields: dict[str, Any], message: str
) -> None:
    config = replace(CONFIG, moe=fields)
    params = random_params(config)
    for change in (
        lambda: prune_experts(config, params, {0: (1,)}),
        lambda: add_experts(config, params, {0: (1,)}),
    ):
        with pytest.raises(UsageError, match=f"block 0 {message}"):
            change()


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        *(
            ({"experts": experts}, f"has experts {experts.kind} unlike")
            for experts in (GatedMlpExpert(), CnnExpert(), MlpExpert(activation="relu"))
        ),
        ({"experts": ExpertList(each=(MlpExpert(), ZeroExpert()) * 2)}, "has experts list, which"),
        (
            {"router": Soft()},
            "has router soft, whose slots",
        ),
        ({"shared_experts": 1}, "has shared experts, which are added"),
        ({"routed_scale": 2.5}, "has routed_scale=2.5, which an MLP has not"),
    ],
)
def test_experts_whose_mean_is_no_mlp_of_the_model_are_not_averaged(
    fields: dict[str, Any], message: str
) -> None:
    config = replace(CONFIG, moe=fields)
    with pytest.raises(UsageError, match=f"block 0 {message}"):
        average_experts(config, random_params(config))


@pytest.mark.parametrize("fields", [{"router": Hash()}, {"gate": CosineGate()}])
def test_experts_are_averaged_whatever_chooses_them(fields: dict[str, Any]) -> None:
    config = replace(CONFIG, moe=fields)
    params = random_params(config)
    dense, averaged = average_experts(config, params)
    assert {path: x.shape for path, x in _flat(averaged).items()} == shapes(dense)
    kernels = (layer(params, 0)["experts"], layer(averaged, 0))
    before, after = (np.asarray(mlp["up"]["kernel"]) for mlp in kernels)
    np.testing.assert_allclose(after, before.mean(0), rtol=1e-6)


def test_gated_experts_of_a_model_without_mlps_are_averaged_to_a_gated_mlp() -> None:
    """The config of such a model, as SigLino-MoE, names no gated MLP."""
    moe = replace(CONFIG.moe, experts=GatedMlpExpert(activation=CONFIG.activation))
    config = replace(CONFIG, depth=1, sparse_blocks=(0,), moe=moe)
    params = random_params(config)
    experts = layer(params, 0)["experts"]
    layer(params, 0)["experts"] = jax.tree.map(lambda x: x[:1].repeat(E, 0), experts)
    dense, averaged = average_experts(config, params)
    assert dense.mlp == "gated" and not dense.sparse_blocks
    np.testing.assert_allclose(logits(dense, averaged), logits(config, params), atol=1e-5)


def test_shared_experts_stay_when_others_are_pruned_or_merged() -> None:
    config = replace(CONFIG, moe=dict(shared_experts=1))
    params = random_params(config)
    kept = {0: range(E)[::-1]}
    same = logits(*prune_experts(config, params, kept))
    np.testing.assert_allclose(same, logits(config, params), rtol=1e-5, atol=1e-5)
    for new_config, new in (
        prune_experts(config, params, {0: (3, 1)}),
        merge_experts(config, params, {0: [(0, 2), (1, 3)]}),
    ):
        assert {path: x.shape for path, x in _flat(new).items()} == shapes(new_config)
        for name, value in _flat(layer(params, 0)["shared"]).items():
            np.testing.assert_array_equal(_flat(layer(new, 0)["shared"])[name], value)


def test_the_bias_of_a_pruned_expert_goes_with_it_and_merged_experts_have_the_mean() -> None:
    config = replace(CONFIG, moe=MoEConfig(num_experts=E, router=BiasBalanced()))
    params = random_params(config)
    bias = np.arange(E, dtype=np.float32)
    coefficient = jnp.float32(0.5)  # of the whole layer
    params["blocks"][1]["mlp"]["state"] = {"bias": jnp.asarray(bias), "coefficient": coefficient}
    _, pruned = prune_experts(config, params, {1: (2, 0)})
    np.testing.assert_array_equal(pruned["blocks"][1]["mlp"]["state"]["bias"], [2, 0])
    _, merged = merge_experts(config, params, {1: [range(E)]}, k=1)
    np.testing.assert_array_equal(merged["blocks"][1]["mlp"]["state"]["bias"], [bias.mean()])
    assert merged["blocks"][1]["mlp"]["state"]["coefficient"] == coefficient


def test_a_pruned_expert_goes_with_its_share_and_a_merged_one_has_those_of_its_members() -> None:
    shares = TokenChoice(shares=(1.0, 2.0, 3.0, 4.0))
    config = replace(CONFIG, moe=MoEConfig(num_experts=E, router=shares))
    params = random_params(config)
    pruned, _ = prune_experts(config, params, {1: (2, 0)})
    merged, _ = merge_experts(config, params, {1: [(0, 3), (1, 2)]})
    assert pruned.moe_of(1).router.shares == (3.0, 1.0)
    assert merged.moe_of(1).router.shares == (5.0, 5.0)


def test_no_more_experts_are_hot_than_are_left() -> None:
    config = replace(CONFIG, moe=MoEConfig(num_experts=E, exchange=Exchange(hot_experts=3)))
    pruned, _ = prune_experts(config, random_params(config), {1: (2, 0)})
    assert (pruned.moe_of(1).exchange.hot_experts, pruned.moe_of(0).exchange.hot_experts) == (2, 3)
