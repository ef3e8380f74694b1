"""Features of a model in the shape of timm, and the fields that other ViT families need."""

from typing import Any

import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from scipy.special import erf

import vmoe
from vmoe.config import MoEConfig, TokenChoice
from vmoe.errors import UsageError
from vmoe.nn.mlp import Hidden, Mlp
from vmoe.nn.moe import MoE
from vmoe.nn.vit import ViT

IMAGES = np.random.default_rng(0).uniform(-1, 1, (3, 16, 24, 3)).astype(np.float32)


def tiny(**fields: Any) -> ViT:
    sizes = dict(patch_size=8, width=16, depth=3, mlp_dim=32, num_heads=2, image_size=16)
    fields = dict(num_classes=5, head_std=1.0, position_std=1.0) | fields
    return vmoe.create_model("vit_tiny", **sizes | fields)


@pytest.mark.parametrize(
    "fields",
    [
        {},
        dict(pre_logits=7),
        dict(pooling="mean", fc_norm=True),
        dict(pooling="attention", sparse_blocks=(2,), moe=MoEConfig(num_experts=2)),
        dict(num_classes=0, pre_norm=True),
    ],
)
def test_the_head_on_the_features_gives_the_logits(fields: dict[str, Any]) -> None:
    model = tiny(**fields)
    tokens = model.forward_features(IMAGES)
    assert tokens.shape == (3, 6 + (model.class_token is not None), 16)
    logits = model.forward_head(tokens)
    np.testing.assert_allclose(logits, model(IMAGES), atol=1e-5)
    features = model.forward_head(tokens, pre_logits=True)
    assert features.shape == (3, fields.get("pre_logits", 16))
    if model.config.num_classes == 0:
        np.testing.assert_array_equal(logits, features)


def test_intermediates_are_the_patches_tokens_of_the_chosen_blocks() -> None:
    model = tiny()
    first, last = model.forward_intermediates(IMAGES, indices=[0, -1], norm=True)
    np.testing.assert_allclose(last, model.forward_features(IMAGES)[:, 1:], atol=1e-5)
    raw = model.forward_intermediates(IMAGES)
    assert len(raw) == 3 and raw[0].shape == (3, 6, 16)
    np.testing.assert_allclose(model.norm(raw[0]), first, atol=1e-6)
    (grid,) = model.forward_intermediates(IMAGES, indices=1, as_grid=True)
    np.testing.assert_array_equal(grid, raw[2].reshape(3, 2, 3, 16))
    with pytest.raises(UsageError, match=r"indices=\[3\]: give blocks of 0 to 2"):
        model.forward_intermediates(IMAGES, indices=[3])


def test_a_new_classifier_replaces_the_last_layer_only() -> None:
    model = tiny(pre_logits=7)
    features = model.forward_head(model.forward_features(IMAGES), pre_logits=True)
    model.reset_classifier(2)
    assert model(IMAGES).shape == (3, 2) and model.config.num_classes == 2
    model.reset_classifier(0)
    np.testing.assert_allclose(model(IMAGES), features, atol=1e-6)
    assert "classes" not in nnx.state(model, nnx.Param)["head"]


@pytest.mark.parametrize(
    ("gelu", "expected"),
    [
        ("erf", lambda x: x * (1 + erf(x / np.sqrt(2))) / 2),
        ("quick", lambda x: x / (1 + np.exp(-1.702 * x))),
        ("tanh", lambda x: x * (1 + np.tanh(np.sqrt(2 / np.pi) * (x + 0.044715 * x**3))) / 2),
    ],
)
def test_mlps_and_experts_have_the_activation_of_the_config(gelu: Any, expected: Any) -> None:
    x = jnp.asarray(np.random.default_rng(1).normal(0, 2, (2, 9, 16)), jnp.float32)
    dense = Mlp(16, 32, hidden=Hidden(gelu), dtype=jnp.float32, rngs=nnx.Rngs(0))
    hidden = expected(np.float64(x @ dense.up.kernel[...]))
    np.testing.assert_allclose(dense(x), hidden @ np.float64(dense.down.kernel[...]), atol=1e-4)
    for implementation in ("batched", "blocked", "ragged"):
        config = MoEConfig(num_experts=1, router=TokenChoice(k=1), implementation=implementation)
        moe = MoE(16, 32, 9, config, gelu=gelu, rngs=nnx.Rngs(0))
        moe.experts.up.kernel[...], moe.experts.down.kernel[...] = (
            layer.kernel[...][None] for layer in (dense.up, dense.down)
        )
        np.testing.assert_allclose(moe(x, jnp.ones(2, bool))[0], dense(x), atol=1e-4)


def test_every_layer_norm_has_the_epsilon_of_the_config() -> None:
    fields = dict(pooling="attention", pre_norm=True, fc_norm=True, norm_epsilon=1e-3)
    norms = [m for _, m in nnx.iter_modules(tiny(**fields)) if isinstance(m, nnx.LayerNorm)]
    assert len(norms) == 2 * 3 + 3 and {norm.epsilon for norm in norms} == {1e-3}
