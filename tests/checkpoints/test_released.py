"""Our parameters have the published names, and every name and shape of four released models."""

import json
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import vmoe
from vmoe import models
from vmoe.checkpoints.released import assign, released_names
from vmoe.config import MoEConfig, Soft
from vmoe.errors import UsageError

SHAPES = json.loads((Path(__file__).parents[1] / "golden" / "released_shapes.json").read_text())
MODELS: dict[str, tuple[str, dict[str, Any]]] = {
    "s32_last2_ilsvrc2012": ("vmoe_s32_last2_e8", {}),
    "s32_last2_ft384": ("vmoe_s32_last2_e8", dict(image_size=384, pre_logits=None)),
    "b16_every2_in21k": ("vmoe_b16_every2_e8", dict(num_classes=21_843)),
    "b16_every2_ft384": ("vmoe_b16_every2_e8", dict(image_size=384)),
}


@pytest.mark.parametrize(("released", "ours"), MODELS.items())
def test_names_and_shapes_are_those_of_the_released_models(
    released: str, ours: tuple[str, dict[str, Any]]
) -> None:
    model = models.build_abstract(models.model_config(ours[0], **ours[1]))
    params = nnx.to_flat_state(nnx.state(model, nnx.Param))
    names = released_names(model)
    shapes = {names[path]: list(leaf.shape) for path, leaf in params}
    assert shapes == SHAPES[released]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda arrays: arrays.pop("cls"), "arrays missing: ['cls']"),
        (lambda arrays: arrays.update(more=np.zeros(3)), "left over: ['more']"),
        (lambda arrays: arrays.update(cls=np.zeros((1, 1, 8))), "cls: shape (1, 1, 8)"),
    ],
)
def test_arrays_that_do_not_fit_are_refused_and_change_nothing(change: Any, message: str) -> None:
    model = vmoe.create_model("vmoe_tiny_last2_e4", depth=2, sparse_blocks=(1,))
    params = dict(nnx.to_flat_state(nnx.state(model, nnx.Param)))
    names = released_names(model)
    arrays = {names[path]: np.ones(leaf.shape) for path, leaf in params.items()}
    before = {path: np.array(leaf[...]) for path, leaf in params.items()}
    change(arrays)
    with pytest.raises(UsageError) as caught:
        assign(model, arrays)
    assert message in str(caught.value)
    for path, leaf in nnx.to_flat_state(nnx.state(model, nnx.Param)):
        np.testing.assert_array_equal(leaf[...], before[path])


def test_arrays_that_fit_replace_the_parameters() -> None:
    model = vmoe.create_model("vmoe_tiny_last2_e4", depth=2, sparse_blocks=(1,))
    params = nnx.to_flat_state(nnx.state(model, nnx.Param))
    names = released_names(model)
    arrays = {names[path]: np.full(leaf.shape, 0.5, np.float16) for path, leaf in params}
    assign(model, arrays)
    for path, leaf in nnx.to_flat_state(nnx.state(model, nnx.Param)):
        assert leaf.dtype == jnp.float32 and (leaf[...] == 0.5).all(), path


def test_parameters_of_a_soft_router_have_the_names_of_the_published_soft_moe() -> None:
    soft = MoEConfig(num_experts=4, router=Soft(), images_per_group=1)
    model = models.build_abstract(
        models.model_config("vmoe_tiny_last2_e4", moe=(MoEConfig(num_experts=4), soft))
    )
    routers = {name for name in released_names(model).values() if "Router" in name}
    assert routers == {
        "Encoder/encoderblock_1/Moe/Router/dense/kernel",
        "Encoder/encoderblock_3/Moe/Router/mu",
        "Encoder/encoderblock_3/Moe/Router/scale",
    }


def test_a_parameter_that_the_published_models_lack_is_refused() -> None:
    model = vmoe.create_model("vit_tiny", depth=1)
    model.blocks[0].more = nnx.Param(jnp.zeros(()))
    with pytest.raises(UsageError, match="blocks/0/more: the published models have no such"):
        released_names(model)
