"""The state of a router in training: the bias of ``BiasBalanced``, which is no parameter.

``test_list_of_experts.py`` kills and resumes a run with such a router.
"""

import dataclasses
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest
from flax.traverse_util import flatten_dict, unflatten_dict

import vmoe
from tests import tiny
from vmoe import models
from vmoe.analysis import capture
from vmoe.axes import Record
from vmoe.config import BiasBalanced, EvalConfig, OptimConfig, TrainConfig, WeightDecayConfig
from vmoe.config import replace as changed
from vmoe.data.pipeline import Batch, training_batches
from vmoe.data.sources import open_source
from vmoe.nn.router_state import with_next_states
from vmoe.nn.vit import ViT
from vmoe.train import train
from vmoe.train.state import State, init_state
from vmoe.train.step import make_inputs, make_train_step, step_key

RATE = 0.125  # sums of it are exact
STEPS = 3  # odd, so that no bias returns to 0
PATH = ("blocks", 0, "mlp", "state", "bias")


@pytest.fixture(scope="module")
def config() -> TrainConfig:
    """Every step changes every parameter: by its gradient, by weight decay and by the average."""
    optim = OptimConfig(lr=0.01, warmup_steps=0, weight_decay=WeightDecayConfig(kernels=0.1))
    router = BiasBalanced(update_rate=RATE)
    moe = dataclasses.replace(tiny.config.model.moe_blocks[0], router=router)
    return changed(
        tiny.config,
        optim=optim,
        ema_decay=0.9,
        model=dict(head_std=0.5, moe=(moe,)),
        batch_size=16,
        steps=STEPS,
        log_every=1,
        evaluate_every=1,
        checkpoint_every=1,
        evaluations=(EvalConfig(batch_size=60),),
    )


@pytest.fixture(scope="module")
def batches(config: TrainConfig) -> list[Batch]:
    read = training_batches(open_source("digits", "train"), config)
    return [read[i].batch for i in range(STEPS)]


@pytest.fixture(scope="module")
def trained(config: TrainConfig, batches: list[Batch]) -> tuple[State, list[Any]]:
    """The state after a step on each batch, and the metrics of each, on the host."""
    step, state, metrics = make_train_step(config), init_state(config), []
    for batch in batches:
        state, measured = step(state, batch)
        metrics.append(jax.device_get(measured))
    return jax.device_get(state), metrics


@pytest.fixture(scope="module")
def in_parts(config: TrainConfig, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of the same steps, each in two parts."""
    workdir = tmp_path_factory.mktemp("whole") / "run"
    train(dataclasses.replace(config, accumulate=2), workdir)
    return workdir


def bias_of(params: Any) -> np.ndarray:
    return flatten_dict(params)[PATH]


@models.compiled
def records_of(model: ViT, images: jax.Array) -> dict[int, Record]:
    return capture(model, images)[1]


def test_the_bias_after_each_step_follows_the_load_of_its_batch(
    config: TrainConfig, batches: list[Batch], trained: tuple[State, list[Any]]
) -> None:
    state, metrics = trained
    first = init_state(config)
    model = models.with_params(config.model, first.params)
    inputs = make_inputs(batches[0], step_key(config, 0), config)
    records = records_of(model)(inputs.images)
    choices = np.bincount(np.asarray(records[0].routing.experts).reshape(-1), minlength=5)[:4]
    loads = [m["blocks"][0]["load"] for m in metrics]
    np.testing.assert_allclose(loads[0], choices / choices.sum(), rtol=1e-6)
    steps = [RATE * np.sign(1 / 4 - np.round(load, 6)) for load in loads]
    assert all(step.any() for step in steps)
    np.testing.assert_array_equal(bias_of(state.params), sum(steps))


def test_a_loop_of_ones_own_changes_the_bias_as_training_does(
    config: TrainConfig, batches: list[Batch], trained: tuple[State, list[Any]]
) -> None:
    """In a ViT with its parameters as a tree, and in a layer as an object."""
    params = init_state(config).params
    inputs = make_inputs(batches[0], step_key(config, 0), config)
    model = models.with_params(config.model, params)
    records = records_of(model)(inputs.images)
    decayed = jax.tree.map(lambda x: np.float32(0.9) * np.asarray(x) + 1, params)
    updated = with_next_states(config.model, decayed, params, records)
    layer = model.blocks[0].mlp
    layer.update_state(records[0])
    expected = RATE * np.sign(1 / 4 - np.round(trained[1][0]["blocks"][0]["load"], 6))
    assert expected.any()
    np.testing.assert_array_equal(bias_of(updated), expected)
    np.testing.assert_array_equal(layer.state["bias"][...], expected)
    kernel = ("blocks", 0, "mlp", "gate", "kernel")
    assert (flatten_dict(updated)[kernel] == flatten_dict(decayed)[kernel]).all()


@pytest.mark.slow
def test_the_bias_of_a_batch_in_two_parts_is_that_of_the_whole(
    in_parts: Path, trained: tuple[State, list[Any]]
) -> None:
    model = vmoe.load(in_parts, use_ema=False).model
    np.testing.assert_array_equal(bias_of(models.params_of(model)), bias_of(trained[0].params))


def test_the_bias_has_no_optimizer_state_and_no_average_of_its_own(
    trained: tuple[State, list[Any]],
) -> None:
    state, metrics = trained
    paths = [jax.tree_util.keystr(path) for path, _ in jax.tree.leaves_with_path(state.opt_state)]
    assert any("'gate'" in path for path in paths) and not any("'state'" in p for p in paths)
    np.testing.assert_array_equal(bias_of(state.ema), bias_of(state.params))
    kernel = ("blocks", 0, "mlp", "gate", "kernel")
    assert (flatten_dict(state.ema)[kernel] != flatten_dict(state.params)[kernel]).any()
    assert not {"router state"} & {
        *metrics[0]["norms"]["gradients"],
        *metrics[0]["norms"]["updates"],
    }


@pytest.mark.slow
def test_a_frozen_router_keeps_its_bias(config: TrainConfig, batches: list[Batch]) -> None:
    frozen = changed(config, optim=dict(lr_factors=dict(routers=0.0)))
    first = init_state(frozen)
    before = jax.device_get(first.params)
    state, metrics = make_train_step(frozen)(first, batches[0])
    load = metrics["blocks"][0]["load"]
    assert (load != load.mean()).any()
    np.testing.assert_array_equal(bias_of(state.params), bias_of(before))
    np.testing.assert_array_equal(bias_of(state.ema), bias_of(before))


def test_evaluation_uses_the_bias_and_leaves_it_as_it_is(
    config: TrainConfig, trained: tuple[State, list[Any]]
) -> None:
    images = np.random.default_rng(0).uniform(-1, 1, (16, 8, 8, 3)).astype(np.float32)
    params = trained[0].params
    biased = models.with_params(config.model, params)
    neutral = flatten_dict(params) | {PATH: np.zeros(4, np.float32)}
    before = bias_of(models.params_of(biased)).copy()
    experts = [
        np.asarray(records_of(model)(images)[0].routing.experts)
        for model in (biased, models.with_params(config.model, unflatten_dict(neutral)))
    ]
    assert (experts[0] != experts[1]).any()
    np.testing.assert_array_equal(bias_of(models.params_of(biased)), before)
