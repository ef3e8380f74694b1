"""One training step compared with its formulas."""

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.special

from tests.command import ROOT, TINY
from vmoe import config as configs
from vmoe import models
from vmoe.analysis import capture
from vmoe.axes import Record
from vmoe.config import TrainConfig, WeightDecayConfig
from vmoe.data.pipeline import Batch, training_batches
from vmoe.data.sources import open_source
from vmoe.nn.inputs import to_float
from vmoe.nn.losses import cross_entropy
from vmoe.train.entries import training_entry
from vmoe.train.state import abstract_state, init_state
from vmoe.train.step import make_inputs, make_train_step
from vmoe.train.timing import COLUMNS


@pytest.fixture(scope="module")
def config() -> TrainConfig:
    return configs.load(ROOT / "configs" / "tiny.py")


@pytest.fixture(scope="module")
def batch(config: TrainConfig) -> Batch:
    return training_batches(open_source("digits", "train"), config)[0].batch


@pytest.fixture(scope="module")
def noiseless(config: TrainConfig) -> TrainConfig:
    """A run whose first step has a gradient to clip, drops choices and draws nothing."""
    optim = dataclasses.replace(
        config.optim,
        warmup_steps=0,
        lr=0.01,
        grad_clip_norm=0.5,
        weight_decay=WeightDecayConfig(kernels=0.1),
    )
    return configs.replace(
        config,
        optim=optim,
        ema_decay=0.7,
        model=dict(head_std=0.5, moe=dict(router=dict(noise_std=0.0, capacity=2))),
    )


@pytest.fixture(scope="module")
def train_step(noiseless: TrainConfig) -> jax.stages.Wrapped:
    return make_train_step(noiseless)


@pytest.fixture(scope="module")
def params(noiseless: TrainConfig) -> dict[str, Any]:
    return jax.tree.map(np.array, init_state(noiseless).params)


@pytest.fixture(scope="module")
def forward_and_backward(
    noiseless: TrainConfig, batch: Batch, params: dict[str, Any]
) -> tuple[dict[str, Any], dict[int, Record]]:
    """The gradient of the first step and the records of its routing, from the public model."""

    def loss(params: dict[str, Any]) -> tuple[jax.Array, dict[int, Record]]:
        model = models.with_params(noiseless.model, params)
        logits, records = capture(model, to_float(batch.images))
        labels = np.eye(10)[batch.labels[:, 0]] * 0.9 + 0.01
        entropy = -(labels * jax.nn.log_softmax(logits)).sum(1).mean()
        importance = sum(r.losses["importance"].mean() for r in records.values())
        return entropy + 0.005 * importance, records

    return jax.jit(jax.grad(loss, has_aux=True))(params)


@pytest.mark.slow
def test_the_first_warmup_step_reports_loss_and_accuracy_and_changes_no_parameter(
    batch: Batch,
) -> None:
    """The second part of the batch has no labels, and no share in the loss and the accuracy."""
    config = dataclasses.replace(configs.load(TINY), label_smoothing=0.2, accumulate=2)
    batch = batch._replace(labels=np.repeat([[0], [3], [-1]], [4, 12, 16], axis=0))
    before = init_state(config)
    start = jax.tree.map(np.array, before.params)
    after, metrics = make_train_step(config)(before, batch)
    # the first learning rate of a warmup is 0, so only the optimizer state changes
    jax.tree.map(np.testing.assert_array_equal, start, jax.tree.map(np.array, after.params))
    assert metrics["lr"] == 0 and int(after.step) == int(after.batch) == 1
    logits = np.log(np.full((32, 10), 0.1))  # a head of zeros gives equal logits
    labels = np.eye(10)[batch.labels[:16, 0]] * 0.8 + 0.02
    assert float(metrics["loss"]) == pytest.approx(-(labels * logits[:16]).sum(1).mean(), rel=1e-5)
    assert float(metrics["accuracy"]) == 0.25  # equal logits predict class 0
    assert 0 < metrics["aux_loss"] < 0.1


def test_a_step_equals_its_formula(
    noiseless: TrainConfig,
    batch: Batch,
    train_step: jax.stages.Wrapped,
    params: dict[str, Any],
    forward_and_backward: tuple[dict[str, Any], dict[int, Record]],
) -> None:
    """Cross-entropy plus auxiliary losses, clipping, Adam's first step, decay of kernels, lr."""
    gradient, _ = forward_and_backward
    norm = np.sqrt(sum((np.asarray(g, np.float64) ** 2).sum() for g in jax.tree.leaves(gradient)))
    after, metrics = train_step(init_state(noiseless), batch)
    assert float(metrics["gradient_norm"]) == pytest.approx(norm, rel=1e-4) and norm > 0.5
    squares = [float(n) ** 2 for n in metrics["norms"]["gradients"].values()]
    assert np.sqrt(sum(squares)) == pytest.approx(norm, rel=1e-4)
    for path, before in jax.tree.leaves_with_path(params):
        now = functools.reduce(lambda tree, key: tree[key.key], path, after.params)
        g = functools.reduce(lambda tree, key: tree[key.key], path, gradient)
        g = np.asarray(g, np.float64) * 0.5 / norm
        decay = 0.1 * before if path[-1].key == "kernel" else 0.0
        expected = before - 0.01 * (g / (np.abs(g) + 1e-8) + decay)
        big = np.abs(g) > 1e-6  # below that, rounding decides the sign of Adam's first step
        np.testing.assert_allclose(np.asarray(now)[big], expected[big], atol=1e-5)


@pytest.mark.parametrize(("loss", "each"), [("softmax", 0.5), ("sigmoid", 1.0)])
def test_several_labels_share_the_probability_in_a_softmax_and_are_each_1_in_a_sigmoid(
    config: TrainConfig, loss: str, each: float
) -> None:
    labels = np.array([[3, 7], [2, -1], [-1, -1]], np.int32)
    pixels = np.arange(3 * 8 * 8 * 3, dtype=np.uint8).reshape(3, 8, 8, 3)
    config = configs.replace(config, loss=loss, label_smoothing=0.1, data=dict(mixup=0.0))
    batch = Batch(pixels, labels, np.ones(3, bool))
    images, targets, _ = jax.jit(lambda key: make_inputs(batch, key, config))(jax.random.key(0))
    np.testing.assert_array_equal(images, to_float(pixels))
    expected = np.zeros((3, 10))
    expected[0, [3, 7]], expected[1, 2] = each, 1.0
    expected[:2] = 0.9 * expected[:2] + 0.01  # the third image has no label to smooth
    np.testing.assert_allclose(targets, expected, rtol=1e-6)


def test_mixing_is_determined_by_the_step(config: TrainConfig, batch: Batch) -> None:
    config = configs.replace(config, data=dict(mixup=0.5))

    def images(seed: int) -> np.ndarray:
        inputs = jax.jit(lambda key: make_inputs(batch, key, config))  # traced for each call
        return np.asarray(inputs(jax.random.key(seed)).images)

    first, again, other = map(images, (0, 0, 1))
    np.testing.assert_array_equal(first, again)
    assert (first != other).any() and (first != to_float(batch.images)).any()


def test_sigmoid_cross_entropy_is_summed_over_classes() -> None:
    rng = np.random.default_rng(0)
    logits = jnp.asarray(rng.normal(size=(4, 6)), jnp.float32)
    labels = jnp.asarray(rng.dirichlet(np.ones(6), size=4), jnp.float32)
    p = scipy.special.expit(np.asarray(logits, np.float64))
    expected = -(labels * np.log(p) + (1 - labels) * np.log(1 - p)).sum(1)
    np.testing.assert_allclose(cross_entropy(logits, labels, "sigmoid"), expected, rtol=1e-5)
    expected = -(labels * scipy.special.log_softmax(np.asarray(logits, np.float64), 1)).sum(1)
    np.testing.assert_allclose(cross_entropy(logits, labels, "softmax"), expected, rtol=1e-5)


def test_the_ema_equals_its_formula_with_a_decay_that_grows_to_ema_decay(
    config: TrainConfig,
    noiseless: TrainConfig,
    batch: Batch,
    train_step: jax.stages.Wrapped,
    params: dict[str, Any],
) -> None:
    assert abstract_state(config).ema is None
    state, expected = init_state(noiseless), params
    for step in range(30):
        state, _ = train_step(state, batch)
        decay = min(0.7, (1 + step) / (10 + step))
        now = jax.tree.map(np.array, state.params)
        expected = jax.tree.map(lambda e, p, d=decay: d * e + (1 - d) * p, expected, now)
    jax.tree.map(functools.partial(np.testing.assert_allclose, atol=1e-5), state.ema, expected)


def test_routing_metrics_of_a_block_equal_those_of_its_record(
    noiseless: TrainConfig,
    batch: Batch,
    train_step: jax.stages.Wrapped,
    forward_and_backward: tuple[dict[str, Any], dict[int, Record]],
) -> None:
    """The oracle counts in NumPy over the record of the same images, routed without noise."""
    record = forward_and_backward[1][1]
    _, metrics = train_step(init_state(noiseless), batch)
    routing_metrics = metrics["blocks"][1]
    experts = np.asarray(record.routing.experts).reshape(-1)
    gates = np.asarray(record.gates, np.float64).reshape(-1, 4)
    np.testing.assert_allclose(
        routing_metrics["load"], np.bincount(experts, minlength=4) / len(experts)
    )
    np.testing.assert_allclose(routing_metrics["importance"], gates.mean(0), rtol=1e-5)
    assert float(routing_metrics["dropped"]) == pytest.approx(
        np.asarray(record.routing.dropped).mean()
    )
    assert routing_metrics["dropped"] > 0.3
    entropy = -(gates * np.log(gates)).sum(1).mean()
    assert float(routing_metrics["gate_entropy"]) == pytest.approx(entropy, rel=1e-4)


def test_the_row_of_a_step_has_the_norms_of_all_parts_and_the_routing_of_each_sparse_block(
    noiseless: TrainConfig, batch: Batch, train_step: jax.stages.Wrapped
) -> None:
    """The second of the two blocks is sparse."""
    _, metrics = train_step(init_state(noiseless), batch)
    timing = dict.fromkeys(COLUMNS)
    tables = training_entry(jax.device_get(metrics), timing, noiseless.model).rows
    (row,) = tables["metrics.csv"]
    for kind in ("parameters", "gradients", "updates"):
        for part in ("attention", "experts", "routers", "head", "positions", "MLPs", "norms"):
            assert row[f"norms/{kind}/{part}"] > 0
    assert 0.3 < row["block1/dropped"] < 1
    assert 0 < row["block1/gate_entropy"] <= np.log(4) + 1e-4
    assert [(row["block"], row["expert"]) for row in tables["experts.csv"]] == [
        (1, expert) for expert in range(4)
    ]
