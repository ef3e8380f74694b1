"""Our parameters under the published names: every name and shape of four released models."""

import json
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import vmoe
from vmoe import models
from vmoe.checkpoints.released import assign, released_name

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
    found = {released_name(path): list(leaf.shape) for path, leaf in params}
    assert found == SHAPES[released]


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
    arrays = {released_name(path): np.ones(leaf.shape) for path, leaf in params.items()}
    before = {path: np.array(leaf[...]) for path, leaf in params.items()}
    change(arrays)
    with pytest.raises(ValueError) as caught:
        assign(model, arrays)
    assert message in str(caught.value)
    for path, leaf in nnx.to_flat_state(nnx.state(model, nnx.Param)):
        np.testing.assert_array_equal(leaf[...], before[path])


def test_arrays_that_fit_take_the_place_of_the_parameters() -> None:
    model = vmoe.create_model("vmoe_tiny_last2_e4", depth=2, sparse_blocks=(1,))
    params = nnx.to_flat_state(nnx.state(model, nnx.Param))
    arrays = {released_name(path): np.full(leaf.shape, 0.5, np.float16) for path, leaf in params}
    assign(model, arrays)
    for path, leaf in nnx.to_flat_state(nnx.state(model, nnx.Param)):
        assert leaf.dtype == jnp.float32 and (leaf[...] == 0.5).all(), path
