"""MoE layers in models that are not ours; the oracle is the parent's output."""

from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

import vmoe
from tests.random_models import outputs, random_images, random_params
from tests.routers import ROUTERS
from vmoe import models
from vmoe.config import GShard, Router, Soft
from vmoe.errors import UsageError
from vmoe.nn.mlp import Mlp
from vmoe.nn.moe import MoE, capture_records

TOKENS = jnp.asarray(np.random.default_rng(0).normal(size=(3, 6, 8)), jnp.float32)  # b n d


class Perceptron(nnx.Module):
    """In an order by name, ``down`` precedes ``up``."""

    def __init__(self, width: int, hidden: int, rngs: nnx.Rngs):
        self.up = nnx.Linear(width, hidden, rngs=rngs)
        self.down = nnx.Linear(hidden, width, rngs=rngs)
        self.norm = nnx.LayerNorm(width, rngs=rngs)

    def __call__(self, x: jax.Array) -> jax.Array:
        return self.norm(self.down(nnx.gelu(self.up(x))))


class Mixer(nnx.Module):
    def __init__(self, tokens: int = 6, width: int = 8):
        rngs = nnx.Rngs(0)
        self.over_tokens = Perceptron(tokens, 10, rngs)
        self.over_channels = nnx.List([Perceptron(width, 12, rngs) for _ in range(2)])
        self.dropout = nnx.Dropout(0.1, rngs=rngs)
        self.head = nnx.Linear(width, 3, use_bias=False, rngs=rngs)

    def __call__(self, x: jax.Array) -> jax.Array:
        x = x + self.over_tokens(x.swapaxes(1, 2)).swapaxes(1, 2)
        for layer in self.over_channels:
            x = x + layer(x)
        return self.head(x.mean(1))


class Convolutional(nnx.Module):
    """Depthwise and pointwise convolutions, as in ConvNeXt."""

    def __init__(self) -> None:
        rngs = nnx.Rngs(0)
        self.depthwise = nnx.Conv(4, 4, (3, 3), feature_group_count=4, rngs=rngs)
        self.pointwise = nnx.Conv(4, 6, (1, 1), rngs=rngs)

    def __call__(self, x: jax.Array) -> jax.Array:
        return nnx.relu(self.pointwise(self.depthwise(x)))


def is_pointwise(path: tuple[Any, ...], module: nnx.Module) -> bool:
    return isinstance(module, nnx.Conv) and path[-1] == "pointwise"


def sparse_paths(model: nnx.Module) -> list[tuple[Any, ...]]:
    return [path for path, part in nnx.iter_modules(model) if isinstance(part, MoE)]


@pytest.mark.long_after(1)
@pytest.mark.parametrize(
    ("select", "paths"),
    [
        (Perceptron, {("over_tokens",), ("over_channels", 0), ("over_channels", 1)}),
        (lambda path, module: path == ("over_channels", 1), {("over_channels", 1)}),
        ((nnx.Linear, nnx.Conv), None),
    ],
)
def test_a_mixer_with_experts_has_the_outputs_of_its_parent(select: Any, paths: Any) -> None:
    parent = Mixer()
    before = outputs(parent, TOKENS)
    child = vmoe.moefy(parent, select=select, num_experts=3)
    found = sparse_paths(child)
    assert set(found) == paths if paths else len(found) == 7
    assert not sparse_paths(parent)
    np.testing.assert_allclose(outputs(child, TOKENS), before, rtol=1e-5, atol=1e-5)


def test_a_pointwise_convolution_becomes_experts_for_its_pixels() -> None:
    x = jax.random.normal(jax.random.key(1), (2, 5, 7, 4))  # b h w d
    parent = Convolutional()
    child = vmoe.moefy(parent, select=is_pointwise, num_experts=4, k=1)
    assert sparse_paths(child) == [("pointwise",)]
    assert child.pointwise.experts.stacked.kernel.shape == (4, 1, 1, 4, 6)
    before = outputs(parent, x)
    np.testing.assert_allclose(outputs(child, x), before, rtol=1e-5, atol=1e-5)
    # without a batch axis
    np.testing.assert_allclose(outputs(child, x[0]), before[0], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("mlp", ["plain", "gated", "gated_norm"])
def test_our_own_mlps_can_be_selected_too(mlp: str) -> None:
    config = models.model_config("vit_test", depth=1, mlp=mlp)
    parent = models.with_params(config, random_params(config))
    child = vmoe.moefy(parent, select=Mlp, num_experts=2)
    np.testing.assert_allclose(
        outputs(child, random_images()), outputs(parent, random_images()), rtol=1e-5, atol=1e-5
    )


def test_experts_start_as_copies_of_the_module_and_the_rest_is_shared() -> None:
    parent = Mixer()
    child = vmoe.moefy(parent, select=Perceptron, num_experts=3, seed=1)
    kernel = parent.over_tokens.up.kernel[...]
    np.testing.assert_array_equal(
        child.over_tokens.experts.stacked.up.kernel[...], np.stack([kernel] * 3)
    )
    assert child.over_tokens.gate.kernel.shape == (6, 3)
    assert child.head.kernel.get_value() is parent.head.kernel.get_value()
    routers = [np.asarray(child.over_channels[i].gate.kernel[...]) for i in range(2)]
    assert (routers[0] != routers[1]).all()


def test_a_layer_equals_a_loop_over_tokens_and_experts() -> None:
    child = vmoe.moefy(nnx.Sequential(nnx.Linear(8, 5, rngs=nnx.Rngs(0))), select=nnx.Linear)
    layer = child.layers[0]
    kernel = layer.experts.stacked.kernel
    kernel[...] += np.float32(np.random.default_rng(2).normal(size=kernel.shape))
    y, record = nnx.jit(MoE.forward)(layer, TOKENS)
    assert y.shape == (3, 6, 5) and not record.routing.dropped.any()
    rows, kernel, bias = (
        np.asarray(x, np.float64)
        for x in (
            np.reshape(TOKENS, (18, 8)),
            layer.experts.stacked.kernel[...],
            layer.experts.stacked.bias[...],
        )
    )
    logits = rows @ np.asarray(layer.gate.kernel[...], np.float64)
    for row, scores, out in zip(rows, logits, np.asarray(y).reshape(18, 5), strict=True):
        first, second = np.argsort(-scores)[:2]
        gates = np.exp(scores[[first, second]])
        expected = sum(
            gate / gates.sum() * (row @ kernel[e] + bias[e])
            for gate, e in zip(gates, (first, second), strict=True)
        )
        np.testing.assert_allclose(out, expected, rtol=1e-5, atol=1e-5)


def test_a_capacity_factor_drops_choices() -> None:
    child = vmoe.moefy(Mixer(), select=Perceptron, num_experts=4, capacity_factor=0.25)
    _, record = jax.jit(child.over_channels[0].forward)(jnp.ones((8, 6, 8)))  # all choose alike
    assert record.routing.dropped.any()


def test_experts_and_routers_train_with_the_auxiliary_loss_under_jit() -> None:
    child = vmoe.moefy(
        Mixer(), select=lambda path, module: path == ("over_channels", 0), num_experts=3
    )
    graph, params, rest = nnx.split(child, nnx.Param, ...)
    optimizer = optax.adam(1e-2)

    @jax.jit
    def step(params: nnx.State, state: Any, weight: float) -> Any:
        def loss(params: nnx.State) -> Any:
            model = nnx.merge(graph, params, rest, copy=True)
            logits, records = capture_records(model, TOKENS)
            aux = sum(r.aux_loss for made in records.values() for r in made)
            labels = jnp.array([0, 1, 2])
            main = optax.softmax_cross_entropy_with_integer_labels(logits, labels).mean()
            return main + weight * aux, (main, aux)

        (_, losses), gradients = jax.value_and_grad(loss, has_aux=True)(params)
        updates, state = optimizer.update(gradients, state)
        return optax.apply_updates(params, updates), state, losses, gradients

    state = jax.jit(optimizer.init)(params)
    params, state, (first, aux), gradients = step(params, state, 1.0)
    assert aux > 0
    for path, gradient in nnx.to_flat_state(gradients):
        values = np.asarray(gradient[...])
        assert np.isfinite(values).all() and (values != 0).any(), path
    for _ in range(30):
        params, state, (main, _), _ = step(params, state, 1.0)
    assert main < 0.5 * first
    _, _, _, gradients = step(params, state, 0.0)  # routers learn from the main loss too
    router = gradients["over_channels"][0]["gate"]["kernel"]
    assert (np.abs(router[...]) > 1e-4).any()


class Shared(nnx.Module):
    def __init__(self) -> None:
        self.first = nnx.Linear(8, 8, rngs=nnx.Rngs(0))
        self.second = self.first

    def __call__(self, x: jax.Array) -> jax.Array:
        return self.second(nnx.relu(self.first(x)))


def test_a_module_that_is_held_twice_becomes_one_layer() -> None:
    child = vmoe.moefy(Shared(), select=nnx.Linear, num_experts=2)
    assert child.first is child.second
    expected = outputs(Shared(), TOKENS)
    np.testing.assert_allclose(outputs(child, TOKENS), expected, rtol=1e-5, atol=1e-5)
    graph, state = nnx.split(child, graph=True)
    records = jax.eval_shape(lambda s: capture_records(nnx.merge(graph, s), TOKENS)[1], state)
    assert [len(made) for made in records.values()] == [2]
    child.never_called = child.first
    child.first, child.second = (
        nnx.Linear(8, 8, rngs=nnx.Rngs(0)),
        nnx.Linear(8, 8, rngs=nnx.Rngs(1)),
    )
    graph, state = nnx.split(child, graph=True)
    records = jax.eval_shape(lambda s: capture_records(nnx.merge(graph, s), TOKENS)[1], state)
    assert records == {("never_called",): ()}


class Residual(nnx.Module):
    """Acts on any width."""

    def __init__(self, *parts: nnx.Module):
        self.parts = nnx.List(parts)

    def __call__(self, x: jax.Array) -> jax.Array:
        for part in self.parts:
            x = x + part(x)
        return x


class Scale(nnx.Module):
    def __init__(self) -> None:
        self.factor = nnx.Param(jnp.full(8, 2.0))

    def __call__(self, x: jax.Array) -> jax.Array:
        return x * self.factor[...]


def test_a_module_without_linear_layers_needs_its_width() -> None:
    model = Residual(Scale())
    with pytest.raises(UsageError, match=r"parts/0: this Scale .* give width"):
        vmoe.moefy(model, select=Scale)
    child = vmoe.moefy(model, select=Scale, width=8)
    np.testing.assert_allclose(outputs(child, TOKENS), 3 * TOKENS, rtol=1e-5)


class LowRank(nnx.Module):
    """A module that all experts share, and a low-rank part of each, which starts at zero."""

    def __init__(self, base: nnx.Module, rngs: nnx.Rngs):
        self.base, self.lora = base, nnx.LoRA(8, 2, 8, rngs=rngs)

    def __call__(self, x: jax.Array) -> jax.Array:
        return self.base(x) + self.lora(x)


def test_experts_gate_and_router_may_be_ones_own() -> None:
    model = Residual(Perceptron(8, 12, nnx.Rngs(0)))
    rngs = nnx.Rngs(1)
    child = vmoe.moefy(
        model,
        select=Perceptron,
        experts=lambda module: [LowRank(module, rngs) for _ in range(5)],
        gate=lambda d, e: nnx.Linear(d, e, rngs=rngs),
        router=GShard(dropless=True),
    )
    layer = child.parts[0]
    assert layer.experts.stacked.lora.lora_a.shape == (5, 8, 2)
    assert layer.experts.stacked.base.up.kernel.shape == (8, 12)
    assert layer.gate.bias.shape == (5,) and layer.router == GShard(dropless=True)
    np.testing.assert_allclose(outputs(child, TOKENS), outputs(model, TOKENS), atol=1e-5)


@pytest.mark.parametrize("config", ROUTERS)
def test_every_router_can_be_given(config: Callable[[], Router]) -> None:
    model = Residual(Perceptron(8, 12, nnx.Rngs(0)))

    def slots(d: int, e: int) -> nnx.Module:
        return nnx.LinearGeneral(d, (e, 2), rngs=nnx.Rngs(0))

    gate = slots if config().logits_per == "slot" else None
    child = vmoe.moefy(model, select=Perceptron, num_experts=3, gate=gate, router=config())
    assert jax.eval_shape(child, TOKENS).shape == TOKENS.shape


def test_the_gate_of_one_expert_per_token_is_trained() -> None:
    model = Residual(Perceptron(8, 12, nnx.Rngs(0)))
    child = vmoe.moefy(model, select=Perceptron, k=1)
    gradients = nnx.jit(nnx.grad(lambda model: (model(TOKENS) ** 2).sum()))(child)
    assert (np.abs(gradients["parts"][0]["gate"]["kernel"][...]).max(0) > 1e-3).any()


class Scanned(nnx.Module):
    """Layers as one stacked module, by Flax's own means."""

    def __init__(self, make: Callable[[int], nnx.Module]):
        self.layers = nnx.vmap(make)(jnp.arange(3))

    def __call__(self, x: jax.Array) -> jax.Array:
        return nnx.scan(lambda x, layer: layer(x), in_axes=(nnx.Carry, 0), out_axes=nnx.Carry)(
            x, self.layers
        )


def test_layers_for_a_scan_are_made_sparse_one_by_one() -> None:
    def dense(seed: jax.Array) -> Residual:
        return Residual(Perceptron(8, 12, nnx.Rngs(jax.random.key(seed))))

    def sparse(seed: jax.Array) -> nnx.Module:
        return vmoe.moefy(dense(seed), select=Perceptron, num_experts=3, seed=seed)

    parent = Scanned(dense)
    message = r"layers/parts/0: its kernels \(3, .*\) are those of 3 layers, .* to one layer"
    with pytest.raises(UsageError, match=message):
        vmoe.moefy(parent, select=Perceptron)
    child = Scanned(sparse)
    gates = child.layers.parts[0].gate.kernel[...]
    assert gates.shape == (3, 8, 3) and (gates[0] != gates[1]).all()
    np.testing.assert_allclose(outputs(child, TOKENS), outputs(parent, TOKENS), atol=1e-5)


def conv(*kernel: int, **fields: Any) -> nnx.Module:
    return Residual(nnx.Conv(8, 8, kernel, rngs=nnx.Rngs(0), **fields))


def test_a_module_with_dropout_and_statistics_becomes_experts() -> None:
    rngs = nnx.Rngs(0)
    dropout, norm = nnx.Dropout(0.5, rngs=rngs), nnx.BatchNorm(8, rngs=rngs)
    model = Residual(nnx.Sequential(nnx.Linear(8, 8, rngs=rngs), dropout, norm))
    child = vmoe.moefy(model, select=nnx.Sequential)
    run = nnx.jit(lambda model: model(TOKENS))
    assert (run(child) != run(child)).any()
    stacked = child.parts[0].experts.stacked
    assert (np.std(stacked.layers[2].mean[...], axis=0) > 0).any()
    fresh = vmoe.moefy(model, select=nnx.Sequential)
    for each in (model, fresh):
        each.eval()
    np.testing.assert_allclose(run(fresh), run(model), atol=1e-5)


@pytest.mark.parametrize(
    ("make", "select", "message"),
    [
        (partial(conv, 3, 3), nnx.Conv, r"parts/0: a convolution with kernel_size=\(3, 3\)"),
        (partial(conv, 1, 1, strides=2), nnx.Conv, "parts/0: a convolution with strides=2"),
        (
            partial(conv, 1, 1, input_dilation=2),
            nnx.Conv,
            "parts/0: a convolution with input_dilation=2",
        ),
        (partial(conv, 1, 1, feature_group_count=2), nnx.Conv, "feature_group_count=2"),
        (partial(conv, 1, 1, padding=1), nnx.Conv, "parts/0: this Conv does not map rows"),
        (Mixer, nnx.Embed, "no module inside the Mixer matches"),
        (Mixer, Mixer, "no module inside the Mixer matches"),
    ],
)
def test_what_cannot_be_an_expert_is_refused_by_its_path(
    make: Callable[[], nnx.Module], select: Any, message: str
) -> None:
    with pytest.raises(UsageError, match=message):
        vmoe.moefy(make(), select=select)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (dict(k=1, router=GShard()), "k=1: the router has its own k: leave it out"),
        (dict(router=Soft()), "a soft router needs one: give gate"),
    ],
)
def test_settings_that_do_not_fit_are_refused(settings: Any, message: str) -> None:
    with pytest.raises(UsageError, match=message):
        vmoe.moefy(Mixer(), select=Perceptron, **settings)
