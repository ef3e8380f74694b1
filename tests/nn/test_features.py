"""Features of a model in the shape of timm, and the fields that other ViT families need."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from scipy.special import erf

from tests.random_models import outputs, random_params
from vmoe import models
from vmoe.config import MlpExpert, MoEConfig, TokenChoice
from vmoe.errors import UsageError
from vmoe.nn.mlp import Hidden, Mlp
from vmoe.nn.moe import MoE
from vmoe.nn.vit import ViT

IMAGES = np.random.default_rng(0).uniform(-1, 1, (3, 16, 24, 3)).astype(np.float32)


def tiny(**fields: Any) -> ViT:
    sizes = dict(patch_size=8, width=16, depth=2, mlp_dim=32, num_heads=2, image_size=16)
    config = models.model_config("vit_test", **sizes | dict(num_classes=5) | fields)
    return models.with_params(config, random_params(config))


@pytest.mark.parametrize(
    "fields",
    [
        {},
        dict(pre_logits=7),
        dict(pooling="mean", fc_norm=True),
        dict(pooling="attention", sparse_blocks=(1,), moe=MoEConfig(num_experts=2)),
        dict(num_classes=0, pre_norm=True),
    ],
)
def test_the_head_on_the_features_gives_the_logits(fields: dict[str, Any]) -> None:
    model = tiny(**fields)

    @jax.jit
    def parts(images: jax.Array) -> tuple[jax.Array, ...]:
        tokens = model.forward_features(images)
        logits, features = (model.forward_head(tokens, pre_logits=x) for x in (False, True))
        return tokens, logits, features, model(images)

    tokens, logits, features, expected = parts(IMAGES)
    assert tokens.shape == (3, 6 + (model.class_token is not None), 16)
    np.testing.assert_allclose(logits, expected, rtol=1e-5, atol=1e-5)
    assert features.shape == (3, fields.get("pre_logits", 16))
    if model.config.num_classes == 0:
        np.testing.assert_array_equal(logits, features)


@pytest.mark.parametrize("registers", [0, 2])
def test_intermediates_are_the_patches_tokens_of_the_chosen_blocks(registers: int) -> None:
    model = tiny(registers=registers)

    @jax.jit
    def parts(images: jax.Array) -> tuple[Any, ...]:
        raw = model.forward_intermediates(images)
        return (
            raw,
            model.norm(raw[0]),
            model.forward_intermediates(images, indices=[0, -1], norm=True),
            model.forward_intermediates(images, indices=1, as_grid=True),
            model.forward_features(images),
        )

    raw, normed, (first, last), (grid,), features = parts(IMAGES)
    np.testing.assert_allclose(last, features[:, 1 + registers :], atol=1e-5)
    assert len(raw) == 2 and raw[0].shape == (3, 6, 16)
    np.testing.assert_allclose(normed, first, atol=1e-6)
    np.testing.assert_array_equal(grid, np.reshape(raw[1], (3, 2, 3, 16)))
    with pytest.raises(UsageError, match=r"indices=\[2\]: give blocks of 0 to 1"):
        model.forward_intermediates(IMAGES, indices=[2])


@pytest.mark.parametrize("mode", ["train", "eval"])
def test_a_mode_of_the_model_is_refused_in_favor_of_the_argument_train(mode: str) -> None:
    with pytest.raises(UsageError, match=r"call model\(images, train=True, key=...\)"):
        getattr(tiny(), mode)()


def test_a_new_classifier_replaces_the_last_layer_only() -> None:
    model = tiny(pre_logits=7)
    features = jax.jit(lambda x: model.forward_head(model.forward_features(x), pre_logits=True))
    expected = features(IMAGES)
    model.reset_classifier(2)
    assert jax.eval_shape(model, IMAGES).shape == (3, 2) and model.config.num_classes == 2
    model.reset_classifier(0)
    np.testing.assert_allclose(outputs(model, IMAGES), expected, rtol=1e-5, atol=1e-6)
    assert "classes" not in nnx.state(model, nnx.Param)["head"]


@pytest.mark.parametrize(
    ("activation", "expected"),
    [
        ("gelu", lambda x: x * (1 + erf(x / np.sqrt(2))) / 2),
        ("quick_gelu", lambda x: x / (1 + np.exp(-1.702 * x))),
        ("gelu_tanh", lambda x: x * (1 + np.tanh(np.sqrt(2 / np.pi) * (x + 0.044715 * x**3))) / 2),
    ],
)
def test_mlps_and_experts_have_the_activation_of_the_config(activation: Any, expected: Any) -> None:
    x = np.float32(np.random.default_rng(1).normal(0, 2, (2, 9, 16)))
    dense = Mlp(16, 32, hidden=Hidden(activation), dtype=jnp.float32, rngs=nnx.Rngs(0))
    up, down = (np.float64(layer.kernel[...]) for layer in (dense.up, dense.down))
    sparse = []
    for implementation in ("batched", "blocked", "ragged"):
        config = MoEConfig(
            num_experts=1, router=TokenChoice(k=1), experts=MlpExpert(implementation=implementation)
        )
        moe = MoE.from_config(config, 16, 32, 9, activation=activation, rngs=nnx.Rngs(0))
        moe.experts.up.kernel[...], moe.experts.down.kernel[...] = (
            layer.kernel[...][None] for layer in (dense.up, dense.down)
        )
        sparse.append(moe)
    y, *same = jax.jit(lambda x: [dense(x), *(moe(x) for moe in sparse)])(x)
    np.testing.assert_allclose(y, expected(x @ up) @ down, atol=1e-4)
    for each in same:
        np.testing.assert_allclose(each, y, atol=1e-4)


def test_every_layer_norm_has_the_epsilon_of_the_config() -> None:
    fields = dict(pooling="attention", pre_norm=True, fc_norm=True, norm_epsilon=1e-3)
    norms = [m for _, m in nnx.iter_modules(tiny(**fields)) if isinstance(m, nnx.LayerNorm)]
    assert len(norms) == 2 * 2 + 3 and {norm.epsilon for norm in norms} == {1e-3}
