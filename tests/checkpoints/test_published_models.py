"""Our parameters have the published names, and every name and shape of four published models."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests.published import published_params
from vmoe import models
from vmoe.checkpoints import read
from vmoe.checkpoints.flax_names import published_name
from vmoe.config import MoEConfig, Soft
from vmoe.errors import UsageError
from vmoe.trees import by_name

SHAPES = json.loads((Path(__file__).parents[1] / "golden" / "published_shapes.json").read_text())
MODELS: dict[str, tuple[str, dict[str, Any]]] = {
    "s32_last2_ilsvrc2012": ("vmoe_s32_last2_e8", {}),
    "s32_last2_ft384": ("vmoe_s32_last2_e8", dict(image_size=384, pre_logits=None)),
    "b16_every2_in21k": ("vmoe_b16_every2_e8", dict(num_classes=21_843)),
    "b16_every2_ft384": ("vmoe_b16_every2_e8", dict(image_size=384)),
}


@pytest.mark.parametrize(("published", "ours"), MODELS.items())
def test_names_and_shapes_equal_the_published_models(
    published: str, ours: tuple[str, dict[str, Any]]
) -> None:
    config = models.model_config(ours[0], **ours[1])
    params = by_name(models.params_of(models.build_abstract(config)))
    names = {published_name(path, config): list(leaf.shape) for path, leaf in params.items()}
    assert names == SHAPES[published]


def test_arrays_of_other_dtypes_become_float32() -> None:
    config = models.model_config("vmoe_test_last2_e4", depth=2, sparse_blocks=(1,))
    params = by_name(models.params_of(models.build_abstract(config)))
    arrays = {
        published_name(path, config): np.full(leaf.shape, 0.5, np.float16)
        for path, leaf in params.items()
    }
    read = by_name(published_params(config, arrays))
    assert read.keys() == params.keys()
    for path, leaf in read.items():
        assert leaf.dtype == np.float32 and (leaf == 0.5).all(), path


def test_a_v_moe_in_a_npz_file_has_the_settings_that_are_assumed_of_a_published_one(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config = models.model_config("vmoe_test_last2_e4", depth=2, sparse_blocks=(1,))
    params = by_name(models.params_of(models.build_abstract(config)))
    arrays = {published_name(path, config): np.ones(leaf.shape) for path, leaf in params.items()}
    np.savez(tmp_path / "model.npz", **arrays)
    moe = read(tmp_path / "model.npz").config.moe
    assert (moe.router.capacity_factor, moe.exchange.dtype) == (1.05, "bfloat16")
    printed = capsys.readouterr().err
    assert "=bfloat16; capacity_factor=1.05, as in the authors' pre-training" in printed


def test_parameters_of_a_soft_router_have_the_names_of_the_published_soft_moe() -> None:
    soft = MoEConfig(num_experts=4, router=Soft())
    config = models.model_config("vmoe_test_last2_e4", moe=(MoEConfig(num_experts=4), soft))
    paths = by_name(models.params_of(models.build_abstract(config)))
    routers = {published_name(path, config) for path in paths if "gate" in path}
    assert routers == {
        "Encoder/encoderblock_1/Moe/Router/dense/kernel",
        "Encoder/encoderblock_3/Moe/Router/mu",
        "Encoder/encoderblock_3/Moe/Router/scale",
    }


@pytest.mark.parametrize("path", ["blocks/0/more", "head/classes/scale", "class_token/bias"])
def test_a_parameter_that_the_published_models_lack_is_refused(path: str) -> None:
    with pytest.raises(UsageError, match=f"{path}: the published models have no such"):
        published_name(path, models.model_config("vit_test"))
