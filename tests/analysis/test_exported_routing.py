"""Exported routing, read by the safetensors library, equals what was collected."""

import json
from pathlib import Path

import numpy as np
import pytest
from safetensors import safe_open
from safetensors.numpy import load_file

from tests.random_models import random_images, random_params
from vmoe import models
from vmoe.analysis import Collected, collect, concatenate
from vmoe.analysis.export import MEANING, export
from vmoe.config import ExpertChoice, MoEConfig, Soft, TokenChoice, replace
from vmoe.errors import UsageError
from vmoe.passes import in_batches

B, N = 5, 17


@pytest.fixture(scope="module")
def parts() -> list[Collected]:
    """Blocks that differ in experts, choices and routers."""
    layers = (
        MoEConfig(num_experts=3, router=TokenChoice(k=1, capacity_factor=0.5, images_per_group=2)),
        MoEConfig(num_experts=4, router=ExpertChoice(images_per_group=2)),
    )
    dense = models.model_config("vit_test", depth=3)
    config = replace(dense, sparse_blocks=(0, 2), moe=layers)
    model = models.with_params(config, random_params(config))
    return list(collect(model, in_batches(random_images(b=B), np.arange(B)[:, None], batch_size=2)))


def test_an_exported_file_holds_every_decision_and_says_what_it_means(
    parts: list[Collected], tmp_path: Path
) -> None:
    whole = concatenate(parts)
    indices = np.split(np.array([7, 3, 5, 2, 9]), [2, 4])
    with safe_open(export(tmp_path / "a.safetensors", iter(parts), iter(indices)), "np") as file:
        arrays = {name: file.get_tensor(name) for name in file.keys()}
        metadata = file.metadata()
    assert metadata.items() >= MEANING.items()
    assert json.loads(metadata["layers"]) == [0, 2] and metadata["tokens_per_image"] == str(N)
    for layer, (block, k) in enumerate(((whole.blocks[0], 1), (whole.blocks[2], 4))):
        e = block.gates.shape[-1]
        own = {name: arrays[name][:, layer].reshape(B, N, -1) for name in ("gates", "experts")}
        np.testing.assert_array_equal(own["gates"][..., :e], block.gates)
        np.testing.assert_array_equal(own["gates"][..., e:], 0)
        none = block.experts == e
        np.testing.assert_array_equal(own["experts"][..., :k], np.where(none, -1, block.experts))
        np.testing.assert_array_equal(own["experts"][..., k:], -1)
        for name, fill in (("positions", -1), ("weights", 0)):
            ours = arrays[name][:, layer].reshape(B, N, -1)
            np.testing.assert_array_equal(ours[..., :k], getattr(block, name))
            np.testing.assert_array_equal(ours[..., k:], fill)
        np.testing.assert_array_equal(arrays["groups"][:, layer], block.groups)
    np.testing.assert_array_equal(arrays["logits"], whole.logits)
    np.testing.assert_array_equal(arrays["labels"], whole.labels)
    np.testing.assert_array_equal(arrays["indices"], [7, 3, 5, 2, 9])
    assert list(tmp_path.iterdir()) == [tmp_path / "a.safetensors"]


def test_of_soft_routers_the_gates_are_exported(tmp_path: Path) -> None:
    dense = models.model_config("vit_test", depth=1)
    moe = MoEConfig(num_experts=3, router=Soft())
    config = replace(dense, sparse_blocks=(0,), moe=moe)
    model = models.with_params(config, random_params(config))
    (part,) = collect(model, in_batches(random_images(b=B)))
    arrays = load_file(export(tmp_path / "a.safetensors", [part]))
    np.testing.assert_array_equal(arrays["gates"], part.blocks[0].gates.reshape(-1, 1, 3))
    assert arrays["experts"].shape == (B * N, 1, 0) and (arrays["labels"] == -1).all()


def test_nothing_is_written_without_a_batch_or_if_collecting_fails(
    parts: list[Collected], tmp_path: Path
) -> None:
    with pytest.raises(UsageError, match="no image, or no sparse block"):
        export(tmp_path / "a.safetensors", [])

    def failing() -> object:
        yield parts[0]
        raise RuntimeError("stopped")

    with pytest.raises(RuntimeError, match="stopped"):
        export(tmp_path / "a.safetensors", failing())
    assert not list(tmp_path.iterdir())
