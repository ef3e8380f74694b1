"""Parameters fitted to another config.

The oracle of positions is a stored run of the authors' code: ``posembed_zoom.npz`` has positions
(1, n, d) before and after the resampling of their fine-tuning.
"""

import dataclasses
import functools
from pathlib import Path
from typing import Any, get_args

import jax
import numpy as np
import pytest
from flax.traverse_util import flatten_dict

from tests.random_models import outputs, random_images, random_params
from vmoe import models
from vmoe.config import (
    CenteredRotary,
    GridRotary,
    MoEConfig,
    Soft,
    TokenChoice,
    ViTConfig,
    replace,
)
from vmoe.config.model import Resampling
from vmoe.errors import UsageError
from vmoe.models import params_of
from vmoe.nn.positions import resample
from vmoe.surgery.params import shapes
from vmoe.surgery.resize import fit, resize_positions
from vmoe.trees import path_name

ZOOM = np.load(Path(__file__).parents[1] / "golden" / "surgery" / "posembed_zoom.npz")
CASES = sorted({name.partition("/")[0] for name in ZOOM.files if "/" in name})
TINY = models.model_config(
    "vmoe_test_last2_e4", depth=2, sparse_blocks=(1,), head_std=0.1, pre_logits=16
)


def names(config: ViTConfig) -> set[str]:
    return {path_name(path) for path in shapes(config)}


def square(n: int) -> tuple[int, int]:
    return int(n**0.5), int(n**0.5)


@pytest.mark.parametrize("case", CASES)
def test_positions_equal_those_that_the_published_code_resamples(case: str) -> None:
    source, target, output = (ZOOM[f"{case}/{x}"] for x in ("source", "target_before", "output"))
    grids = dict(grid=square(source.shape[1]), new_grid=square(target.shape[1]))
    resize = functools.partial(resize_positions, **grids, method="bilinear")
    ours = jax.jit(resize)(source, target)
    np.testing.assert_allclose(ours, output, rtol=0, atol=1e-6)


def test_positions_of_grids_that_are_not_square_are_resampled_along_each_axis() -> None:
    """Aligned corners reproduce a plane with those values at the corners."""
    plane = np.add.outer(np.linspace(0, 1, 3), np.linspace(0, 2, 5)).reshape(1, 15, 1)
    expected = np.add.outer(np.linspace(0, 1, 4), np.linspace(0, 2, 2)).reshape(1, 8, 1)
    grids = dict(grid=(3, 5), new_grid=(4, 2))
    resize = jax.jit(functools.partial(resize_positions, **grids, method="bilinear"))
    ours = resize(np.float32(plane), np.zeros((1, 8, 1), np.float32))
    np.testing.assert_allclose(ours, expected, atol=1e-6)


def test_positions_are_resampled_by_the_method_of_the_given_parameters() -> None:
    """Whatever that of the target is, which is for images of other sizes than its own."""
    params, target = random_params(TINY), replace(TINY, image_size=48)
    fitted, _ = fit(replace(TINY, position_resampling="bicubic"), params, target)
    given, found = (each["positions"]["embedding"][0, 1:] for each in (params, fitted))
    expected = resample(given.reshape(4, 4, -1), 6, 6, "bicubic").reshape(36, -1)
    np.testing.assert_allclose(found, expected, atol=1e-6)


@pytest.mark.slow
@pytest.mark.parametrize("method", get_args(Resampling))
def test_a_model_fitted_to_another_image_size_has_the_logits_of_its_parent_there(
    method: Resampling,
) -> None:
    params, given = random_params(TINY), replace(TINY, position_resampling=method)
    target = replace(TINY, image_size=48)
    fitted, changes = fit(given, params, target)
    assert changes.resized == ["positions/embedding"]
    assert set(changes.loaded) == names(TINY) - {"positions/embedding"}
    assert changes.new == changes.dropped == []
    parent, child = models.with_params(given, params), models.with_params(target, fitted)
    x = random_images(48)
    np.testing.assert_allclose(outputs(child, x), outputs(parent, x), rtol=1e-5, atol=1e-5)


def test_the_same_config_loads_every_parameter_unchanged() -> None:
    params = random_params(TINY)
    fitted, changes = fit(TINY, params, TINY)
    assert (set(changes.loaded), *changes[1:]) == (names(TINY), [], [], [])
    jax.tree.map(np.testing.assert_array_equal, fitted, params)


@pytest.mark.parametrize("router", [TokenChoice(k=1, priority="largest_gate"), TokenChoice(k=4)])
def test_k_capacity_and_priority_change_no_parameter(router: TokenChoice) -> None:
    moe = dataclasses.replace(TINY.moe, router=replace(router, capacity_factor=4.0))
    _, changes = fit(TINY, random_params(TINY), replace(TINY, moe=moe))
    assert set(changes.loaded) == names(TINY)


def test_other_classes_get_the_initial_head_of_the_target_and_keep_the_rest() -> None:
    params, target = random_params(TINY), replace(TINY, num_classes=7, head_bias=-2.0)
    fitted, changes = fit(TINY, params, target, seed=3)
    head = ["head/classes/bias", "head/classes/kernel"]
    assert sorted(changes.new) == sorted(changes.dropped) == head
    assert set(changes.loaded) == names(TINY) - set(head)
    expected = jax.jit(lambda: params_of(models.build(target, seed=3).head.classes))()
    for name, value in fitted["head"]["classes"].items():
        np.testing.assert_allclose(value, expected[name], rtol=1e-6)
    assert 0.05 < np.std(fitted["head"]["classes"]["kernel"]) < 0.15  # head_std is 0.1
    np.testing.assert_array_equal(fitted["head"]["classes"]["bias"], -2.0)


def test_without_pre_logits_the_head_is_new_even_if_its_shape_is_the_same() -> None:
    fitted, changes = fit(TINY, random_params(TINY), replace(TINY, pre_logits=None))
    assert sorted(changes.new) == ["head/classes/bias", "head/classes/kernel"]
    assert sorted(changes.dropped) == sorted([*changes.new, *PRE_LOGITS])
    assert "pre_logits" not in fitted["head"]


PRE_LOGITS = ["head/pre_logits/bias", "head/pre_logits/kernel"]


def test_a_new_head_can_be_requested() -> None:
    _, changes = fit(TINY, random_params(TINY), TINY, new_head=True)
    assert sorted(changes.new) == ["head/classes/bias", "head/classes/kernel"]


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        (
            dict(sparse_blocks=()),
            "sparse_blocks .1,., and .*only in the model: blocks/1/mlp/down/bias",
        ),
        (
            dict(depth=3),
            "depth 2, and the model has depth 3; only in the model: blocks/2/attention/[^;]*; use",
        ),
        (
            dict(depth=1, sparse_blocks=()),
            "the model has depth 1, .*; only in the weights: blocks/1/attention/key/bias, ",
        ),
        (
            dict(pooling="mean"),
            "model.pooling=mean: the parameters were trained with model.pooling=class",
        ),
        (dict(moe=dict(num_experts=3)), "weights have num_experts .4,., and the model has num_e"),
        (
            dict(mlp_dim=24, head_dim=TINY.dim_per_head),
            "the weights have mlp_dim 32, and the model has mlp_dim 24; other shapes: "
            "blocks/0/mlp/down/kernel is 32 x 16 in the weights and 24 x 16 in the model, .*, and "
            "4 more; use .*takes .. of the model's .. parameters",
        ),
    ],
)
def test_changes_that_the_target_does_not_need_are_refused_unless_allowed(
    fields: dict[str, Any], message: str
) -> None:
    params, target = random_params(TINY), replace(TINY, **fields)
    with pytest.raises(UsageError, match=message):
        fit(TINY, params, target)
    fitted, changes = fit(TINY, params, target, partial=True)
    assert {path: leaf.shape for path, leaf in flatten_dict(fitted).items()} == shapes(target)
    assert {*changes.loaded, *changes.new, *changes.resized} == names(target)
    assert {*changes.loaded, *changes.dropped, *changes.resized} == names(TINY)


@pytest.mark.parametrize(
    ("trained", "fields", "message"),
    [
        (
            {},
            dict(activation="gelu"),
            "model.activation=gelu: the parameters were trained with model.activation=gelu_tanh",
        ),
        (
            dict(rotary=GridRotary()),
            dict(rotary=GridRotary(side=8)),
            "model.rotary.kind=grid, model.rotary.base=10000.0, model.rotary.side=8: the "
            "parameters were trained with model.rotary.kind=grid, model.rotary.base=10000.0, "
            "model.rotary.side=16",
        ),
        (
            dict(rotary=CenteredRotary()),
            dict(rotary=None),
            "model.rotary=None: the parameters were trained with model.rotary.kind=centered, "
            "model.rotary.base=100.0",
        ),
    ],
    ids=["activation", "side", "rotary"],
)
def test_other_arithmetic_is_refused_even_if_a_partial_load_is_allowed(
    trained: dict[str, Any], fields: dict[str, Any], message: str
) -> None:
    config = replace(TINY, **trained)
    with pytest.raises(UsageError) as error:
        fit(config, random_params(config), replace(config, **fields), partial=True)
    assert str(error.value) == f"{message}; use that"


def test_a_partial_load_can_be_limited_to_some_paths() -> None:
    params, target = random_params(TINY), replace(TINY, sparse_blocks=())
    with pytest.raises(UsageError, match="blocks/1/mlp"):
        fit(TINY, params, target, partial=["blocks/0/mlp", "blocks/1/ml"])
    _, changes = fit(TINY, params, target, partial=["blocks/1/mlp"])
    assert all(name.startswith("blocks/1/mlp/") for name in [*changes.new, *changes.dropped])


def test_slots_of_a_soft_router_do_not_fit_another_image_size() -> None:
    soft = replace(TINY, moe=MoEConfig(num_experts=4, router=Soft()))
    target = replace(soft, image_size=64)
    with pytest.raises(UsageError, match="blocks/1/mlp/gate/kernel"):
        fit(soft, random_params(soft), target)


def test_moments_of_an_optimizer_get_zeros_where_parameters_are_new() -> None:
    target = replace(TINY, num_classes=7)
    zeros = jax.tree.map(np.zeros_like, random_params(target))
    moments, _ = fit(TINY, random_params(TINY), target, initial=zeros)
    np.testing.assert_array_equal(moments["head"]["classes"]["kernel"], np.zeros((16, 7)))
    assert np.all(moments["norm"]["scale"] != 0)
