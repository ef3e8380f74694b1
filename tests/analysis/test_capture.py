"""Features and attention maps by name; the oracles are the model's own outputs and NumPy."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy.special import softmax

from tests.random_models import random_images, random_params
from vmoe import models
from vmoe.analysis import Captured, capture, capture_features, feature_names
from vmoe.analysis.interventions import ablated
from vmoe.config import GridRotary, MoEConfig, TokenChoice, ViTConfig, replace
from vmoe.errors import UsageError

B, N, HEADS = 2, 4, 2
IMAGES = random_images(16, b=B)
PARTS = ("", ".attention", ".attention.weights", ".mlp")
NAMES = [*(f"blocks.{i}{part}" for i in (0, 1) for part in PARTS), "encoded", "pre_logits"]
MODELS = {
    "class_token": dict(pre_logits=7),  # whose last block computes one token only, if not asked
    "mean_pooled": dict(pooling="mean", qk_norm=True, remat=True),
    "class_token_in_a_sparse_last_block_under_another_decision": dict(sparse_blocks=(1,)),
}


def config_of(**fields: Any) -> ViTConfig:
    sizes = dict(patch_size=8, width=16, depth=2, mlp_dim=32, num_heads=HEADS, image_size=16)
    config = models.model_config("vit_test", **sizes, num_classes=5)
    moe = MoEConfig(num_experts=3, router=TokenChoice(images_per_group=2))
    return replace(config, **dict(sparse_blocks=(0,), moe=moe) | fields)


@pytest.mark.long_after(1)
@pytest.mark.parametrize("fields", MODELS.values(), ids=MODELS.keys())
def test_features_and_attention_maps_equal_the_forward_pass(fields: dict[str, Any]) -> None:
    config = config_of(**fields)
    params, first = random_params(config), int(config.has_class_token)
    changed = config.depth if config.sparse_blocks == (0,) else config.sparse_blocks[0]
    decide = {changed: ablated(jnp.arange(3) != 1)} if changed < config.depth else None

    @jax.jit
    def run(params: dict[str, Any], images: jax.Array) -> tuple[Any, ...]:
        model = models.with_params(config, params)
        encoded = model.forward_features(images)
        return (
            capture_features(model, images, feature_names(model), decide=decide),
            capture(model, images, decide=decide),
            (encoded, model.forward_head(encoded, pre_logits=True), model.forward_head(encoded)),
            (model.embed(images), model.forward_intermediates(images)),
        )

    captured, (logits, records), own, (tokens, blocks) = jax.device_get(run(params, IMAGES))
    assert isinstance(captured, Captured) and list(captured.features) == NAMES
    features, close = captured.features, dict(rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(captured.logits, logits, **close)
    jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, **close), captured.records, records)
    if decide is None:
        for name, expected in zip(("encoded", "pre_logits"), own[:2], strict=True):
            np.testing.assert_allclose(features[name], expected, **close)
    else:
        assert np.abs(captured.logits - own[2]).max() > 1e-3
    for i in range(config.depth):
        after = features[f"blocks.{i}"]
        if i < changed:
            np.testing.assert_allclose(after[:, first:], blocks[i], **close)
        attention, mlp = features[f"blocks.{i}.attention"], features[f"blocks.{i}.mlp"]
        np.testing.assert_allclose(tokens + attention + mlp, after, **close)
        weights = features[f"blocks.{i}.attention.weights"]
        assert weights.shape == (B, HEADS, N + first, N + first) and weights.dtype == jnp.float32
        np.testing.assert_allclose(weights.sum(-1), 1, rtol=1e-5)
        block = params["blocks"][i]
        by_hand, outputs = attend(block["attention"], normalized(tokens, block["norm1"]))
        np.testing.assert_allclose(weights, by_hand, **close)
        np.testing.assert_allclose(attention, outputs(np.float64(weights)), rtol=1e-3, atol=1e-4)
        tokens = after


def test_attention_maps_of_rotary_positions_make_the_outputs_of_the_attention() -> None:
    config = config_of(depth=1, sparse_blocks=(), rotary=GridRotary(), registers=1)
    params = random_params(config)
    model, names = models.with_params(config, params), ["blocks.0.attention"]
    names.append(f"{names[0]}.weights")
    attention, weights = capture_features(model, IMAGES, names).features.values()
    block, tokens = params["blocks"][0], model.embed(IMAGES)
    unrotated, outputs = attend(block["attention"], normalized(tokens, block["norm1"]))
    np.testing.assert_allclose(attention, outputs(np.float64(weights)), rtol=1e-3, atol=1e-4)
    assert np.abs(weights - unrotated).max() > 1e-3


def attend(params: dict[str, Any], x: np.ndarray) -> tuple[np.ndarray, Any]:
    """The attention weights in float64, and what given weights make of the values."""
    projected = {
        name: np.einsum("bnd,daz->bnaz", x, np.float64(params[name]["kernel"]))
        + np.float64(params[name]["bias"])
        for name in ("query", "key", "value")
    }
    query, key = (normalized(projected[x], params.get(f"{x}_ln")) for x in ("query", "key"))
    logits = np.einsum("bqaz,bnaz->baqn", query, key) / np.sqrt(query.shape[-1])
    out = {name: np.float64(array) for name, array in params["out"].items()}

    def outputs(weights: np.ndarray) -> np.ndarray:
        mixed = np.einsum("baqn,bnaz->bqaz", weights, projected["value"])
        return np.einsum("bqaz,azd->bqd", mixed, out["kernel"]) + out["bias"]

    return softmax(logits, axis=-1), outputs


def normalized(x: np.ndarray, norm: dict[str, Any] | None) -> np.ndarray:
    """Layer norm in float64; x if there is none."""
    if norm is None:
        return x
    x = np.float64(x)
    centered = x - x.mean(-1, keepdims=True)
    scaled = centered / np.sqrt(np.square(centered).mean(-1, keepdims=True) + 1e-6)
    return scaled * np.float64(norm["scale"]) + np.float64(norm.get("bias", 0.0))


def test_an_unknown_feature_is_refused_with_the_nearest_name() -> None:
    config = config_of()
    model = models.with_params(config, random_params(config))
    with pytest.raises(UsageError, match=r"feature 'blocks.1.mpl': did you mean 'blocks.1.mlp'"):
        capture_features(model, IMAGES, ["blocks.1.mpl"])
