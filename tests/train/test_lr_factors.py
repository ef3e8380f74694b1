"""Learning rates by part and layer, and frozen parts, compared with their formulas."""

import csv
import dataclasses
import functools
import json
import shutil
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx
from flax.traverse_util import flatten_dict

from tests.command import TINY, vmoe
from tests.routers import grouped
from tests.run_folder import parameters, rows
from vmoe import config as configs
from vmoe import models
from vmoe.config import (
    LrFactorsConfig,
    MoEConfig,
    OptimConfig,
    Router,
    Soft,
    TokenChoice,
    TrainConfig,
    ViTConfig,
    WeightDecayConfig,
)
from vmoe.costs.flops import count_flops, countable, flops_to_logits
from vmoe.data.pipeline import Batch, training_batches
from vmoe.data.sources import open_source
from vmoe.errors import UsageError
from vmoe.train.lr_factors import trained_params, training_messages
from vmoe.train.optim import optimizer
from vmoe.train.state import State, abstract_state, init_state
from vmoe.train.step import Metrics, make_train_step

HEAD_ONLY = LrFactorsConfig(routers=0.0, experts=0.0, others=0.0)
PROBE = [f"--optim.lr-factors.{part}=0" for part in ("routers", "experts", "others")]
SGD = OptimConfig(
    kind="sgd", lr=0.5, warmup_steps=0, schedule="constant", momentum=0.0, grad_clip_norm=None
)
NO_DECAY = WeightDecayConfig(kernels=0.0)


@pytest.fixture(scope="module")
def config() -> TrainConfig:
    """A run whose routers, experts and head all have gradients from the first step on."""
    return configs.replace(
        configs.load(TINY), model=dict(head_std=0.5), optim=dict(warmup_steps=0), ema_decay=0.9
    )


@pytest.fixture(scope="module")
def batch(config: TrainConfig) -> Batch:
    return training_batches(open_source("digits", "train"), config)[0].batch


def with_optim(config: TrainConfig, **changes: Any) -> TrainConfig:
    return dataclasses.replace(config, optim=dataclasses.replace(config.optim, **changes))


def ones(model: ViTConfig) -> dict[str, Any]:
    """Parameters with the names of a model's, each a single 1."""
    params = nnx.to_pure_dict(nnx.state(models.build_abstract(model), nnx.Param))
    return jax.tree.map(lambda _: np.ones(1, np.float32), params)


def updates_of_ones(config: TrainConfig) -> dict[tuple[Any, ...], float]:
    """Updates by path, where all gradients and parameters are 1."""
    params = ones(config.model)
    optim = optimizer(config)
    updates, _ = optim.update(params, optim.init(params), params)
    return {path: float(update[0]) for path, update in flatten_dict(updates).items()}


def after_steps(
    config: TrainConfig, batch: Batch, steps: int
) -> tuple[dict[Any, np.ndarray], State, Metrics]:
    """The first parameters by path, and the state and metrics after some steps."""
    state, train_step = init_state(config), make_train_step(config)
    start = flatten_dict(jax.tree.map(np.array, state.params))
    metrics: Metrics = {}
    for _ in range(steps):
        state, metrics = train_step(state, batch)
    return start, state, metrics


def changed(start: dict[Any, np.ndarray], params: dict[str, Any]) -> set[Any]:
    """The paths of the parameters of which any bit has changed."""
    after = flatten_dict(params)
    assert after.keys() == start.keys()
    return {path for path in start if start[path].tobytes() != np.asarray(after[path]).tobytes()}


def test_shared_experts_are_experts_for_factors_decay_and_freezing() -> None:
    layer = MoEConfig(num_experts=2, shared_experts=1)
    model = ViTConfig(depth=1, width=4, num_heads=1, mlp_dim=4, sparse_blocks=(0,), moe=layer)
    decay = WeightDecayConfig(kernels=0.0, experts=0.4)
    optim = dataclasses.replace(SGD, lr_factors=LrFactorsConfig(experts=0.5), weight_decay=decay)
    updates = updates_of_ones(TrainConfig(model=model, optim=optim))
    shared = {path: x for path, x in updates.items() if "shared" in path}
    assert len(shared) == 4
    for path, update in shared.items():
        assert update == pytest.approx(-0.5 * 0.5 * (1 + 0.4 * (path[-1] == "kernel")))
    frozen = dataclasses.replace(SGD, lr_factors=LrFactorsConfig(experts=0.0))
    params = nnx.to_pure_dict(nnx.state(models.build_abstract(model), nnx.Param))
    trained = flatten_dict(trained_params(frozen, params))
    assert trained and not {"shared", "experts"} & {word for path in trained for word in path}
    (message,) = training_messages(frozen, params)
    assert message.endswith("frozen: experts")

    own = dataclasses.replace(SGD, lr_factors=LrFactorsConfig(shared_experts=0.0))
    left_out = flatten_dict(params).keys() - flatten_dict(trained_params(own, params)).keys()
    assert left_out == shared.keys()
    (message,) = training_messages(own, params)
    assert message.endswith("(head, routers, experts, others); frozen: shared_experts")
    with pytest.raises(UsageError, match="shared_experts=0.0: the model has no shared experts"):
        TrainConfig(optim=own)


def test_the_factor_of_a_part_multiplies_its_learning_rate_and_so_its_weight_decay() -> None:
    factors = LrFactorsConfig(head=10.0, routers=2.0, experts=0.5, others=0.1)
    optim = dataclasses.replace(
        SGD, lr_factors=factors, weight_decay=WeightDecayConfig(kernels=0.4)
    )
    model = ViTConfig(depth=2, width=4, num_heads=1, mlp_dim=4, num_classes=3, sparse_blocks=(1,))
    updates = updates_of_ones(TrainConfig(model=model, optim=optim))
    for path, factor in {
        ("head", "classes"): 10.0,
        ("blocks", 1, "mlp", "gate"): 2.0,
        ("blocks", 1, "mlp", "experts", "up"): 0.5,
        ("blocks", 0, "mlp", "up"): 0.1,
        ("blocks", 1, "attention", "query"): 0.1,
        ("patches", "embed"): 0.1,
    }.items():
        assert updates[*path, "kernel"] == pytest.approx(-0.5 * factor * (1 + 0.4)), path
    assert updates["head", "classes", "bias"] == pytest.approx(-0.5 * 10)
    assert updates["blocks", 1, "mlp", "experts", "up", "bias"] == pytest.approx(-0.5 * 0.5)
    assert updates["norm", "scale"] == pytest.approx(-0.5 * 0.1)


@pytest.mark.parametrize("pooling", ["class_token", "attention"])
def test_the_learning_rate_decays_from_the_head_down_to_the_embeddings(pooling: Any) -> None:
    """The oracle counts layers from the input on, as MAE does: embeddings 0, block i i + 1."""
    model = ViTConfig(
        depth=3, width=4, num_heads=1, mlp_dim=4, num_classes=3, sparse_blocks=(1,), pre_norm=True,
        pooling=pooling, pre_logits=4,
    )  # fmt: skip
    optim = dataclasses.replace(
        SGD, layer_decay=0.7, lr_factors=LrFactorsConfig(experts=3.0), weight_decay=NO_DECAY
    )
    layers = dict.fromkeys(("patches", "class_token", "positions", "pre_norm"), 0)
    layers |= dict.fromkeys(("norm", "attention_pool", "head"), 4)
    scales = [0.7 ** (4 - layer) for layer in range(5)]
    for path, update in updates_of_ones(TrainConfig(model=model, optim=optim)).items():
        layer = path[1] + 1 if path[0] == "blocks" else layers[path[0]]
        expected = -0.5 * scales[layer] * (3 if "experts" in path else 1)
        assert update == pytest.approx(expected), path


def test_without_factors_the_optimizer_is_bitwise_that_of_optax() -> None:
    theirs = optax.chain(
        optax.clip_by_global_norm(1.0),
        optax.adamw(
            optax.warmup_cosine_decay_schedule(0.0, 1e-3, 2, 10, end_value=1e-5),
            weight_decay=0.05,
            mask=functools.partial(
                jax.tree.map_with_path, lambda path, _: path[-1].key == "kernel"
            ),
        ),
    )
    params = ones(ViTConfig(depth=2, sparse_blocks=(1,)))
    rng = np.random.default_rng(0)
    gradients = [
        jax.tree.map(lambda _: rng.normal(size=1).astype(np.float32), params) for _ in range(4)
    ]
    results = []
    for optim in (optimizer(TrainConfig(optim=OptimConfig(warmup_steps=2), steps=10)), theirs):
        after, state = params, optim.init(params)
        for gradient in gradients:
            updates, state = optim.update(gradient, state, after)
            after = optax.apply_updates(after, updates)
        results.append(jax.tree.leaves((after, state)))
    for ours, oracle in zip(*results, strict=True):
        assert np.asarray(ours).tobytes() == np.asarray(oracle).tobytes()


def test_a_config_without_factors_is_read_as_one_with_factors_of_1(config: TrainConfig) -> None:
    fields = json.loads(configs.to_json(config))
    del fields["optim"]["lr_factors"], fields["optim"]["layer_decay"]
    assert configs.from_json(TrainConfig, json.dumps(fields)) == config


def test_a_linear_probe_changes_the_head_and_no_bit_of_anything_else(
    config: TrainConfig, batch: Batch
) -> None:
    """Neither gradients, weight decay nor averaging change frozen parts, and they have no state."""
    config = with_optim(
        config, lr_factors=HEAD_ONLY, weight_decay=WeightDecayConfig(kernels=0.5, others=0.5)
    )
    start, state, metrics = after_steps(config, batch, 3)
    head = {("head", "classes", "kernel"), ("head", "classes", "bias")}
    assert changed(start, state.params) == head
    assert state.ema is not None and changed(start, state.ema) == head
    shapes = [leaf.shape for leaf in jax.tree.leaves(state.opt_state)]
    assert sorted(shapes) == sorted([(), (), (16, 10), (16, 10), (10,), (10,)])
    assert metrics["norms"]["gradients"].keys() == {"head"}
    assert metrics["lr"] == pytest.approx(config.optim.lr, rel=1e-2)  # the schedule's own


@pytest.mark.slow
def test_frozen_routers_and_experts_stay_and_all_else_is_clipped_by_its_own_norm(
    config: TrainConfig, batch: Batch
) -> None:
    """The oracle is a step of SGD that trains everything, with the gradients of a smaller norm."""
    optim = dataclasses.replace(SGD, grad_clip_norm=0.1, weight_decay=NO_DECAY)
    config = dataclasses.replace(config, optim=optim)
    start, full, metrics = after_steps(config, batch, 1)
    norms = {part: float(norm) for part, norm in metrics["norms"]["gradients"].items()}
    norm = np.sqrt(sum(x**2 for part, x in norms.items() if part not in ("routers", "experts")))
    ratio = float(metrics["gradient_norm"]) / norm
    assert norm > 0.1 and ratio > 1.02
    frozen = with_optim(config, lr_factors=LrFactorsConfig(routers=0.0, experts=0.0))
    _, partial, metrics = after_steps(frozen, batch, 1)
    assert float(metrics["gradient_norm"]) == pytest.approx(norm, rel=1e-4)
    everything = changed(start, full.params)
    kept = {path for path in everything if "gate" in path or "experts" in path}
    assert kept and changed(start, partial.params) == everything - kept
    after, trained = flatten_dict(partial.params), flatten_dict(full.params)
    for path in everything - kept:
        expected = start[path] + ratio * (trained[path] - start[path])
        np.testing.assert_allclose(after[path], expected, rtol=0, atol=1e-6)


def test_a_linear_probe_computes_the_forward_pass_and_the_gradient_of_the_head_alone(
    config: TrainConfig, batch: Batch
) -> None:
    config = dataclasses.replace(config, model=countable(config.model))
    b, width, classes = len(batch.images), config.model.width, config.model.num_classes

    def step_flops(config: TrainConfig) -> int:
        return count_flops(make_train_step(config).trace(abstract_state(config), batch).jaxpr.jaxpr)

    forward = b * flops_to_logits(config.model)
    probe = step_flops(with_optim(config, lr_factors=HEAD_ONLY))
    assert probe == forward + 2 * b * width * classes
    assert step_flops(config) > 2.5 * forward


@pytest.mark.parametrize("router", [TokenChoice(), Soft()], ids=["token_choice", "soft"])
def test_every_update_moves_the_experts_towards_the_mean_of_the_others(
    router: Router, config: TrainConfig
) -> None:
    """The oracle takes the experts after the same update without averaging, one by one."""
    config = configs.replace(config, model=dict(moe=dict(router=grouped(router, 1))))
    rng = np.random.default_rng(0)
    params, gradient = (
        jax.tree.map(
            lambda leaf: rng.normal(size=leaf.shape).astype(np.float32),
            models.params_of(models.build_abstract(config.model)),
        )
        for _ in range(2)
    )

    def updated(share: float) -> dict[Any, jax.Array]:
        optim = optimizer(with_optim(config, lr=0.5, expert_averaging=share))

        def update(params: Any, gradient: Any) -> Any:
            updates, _ = optim.update(gradient, optim.init(params), params)
            return optax.apply_updates(params, updates)

        return flatten_dict(jax.jit(update)(params, gradient))

    apart, averaged = updated(0.0), updated(0.3)
    for path, value in apart.items():
        expected = np.asarray(value)
        if "experts" in path:
            means = [np.delete(expected, i, axis=0).mean(0) for i in range(len(expected))]
            expected = 0.7 * expected + 0.3 * np.stack(means)
        np.testing.assert_allclose(averaged[path], expected, rtol=0, atol=1e-6, err_msg=str(path))


@pytest.mark.parametrize(
    "changes",
    [dict(model=dict(sparse_blocks=())), dict(optim=dict(lr_factors=dict(experts=0.0)))],
    ids=["dense", "frozen"],
)
def test_averaging_is_refused_where_no_experts_are_trained(
    config: TrainConfig, changes: dict[str, Any]
) -> None:
    optim = changes.get("optim", {}) | {"expert_averaging": 0.5}
    with pytest.raises(UsageError, match=r"optim.expert_averaging=0.5: no experts are trained"):
        configs.replace(config, **changes | {"optim": optim})


def test_a_message_names_the_factors_and_the_numbers_of_parameters() -> None:
    params = {
        "blocks": {0: {"mlp": {"up": {"kernel": jnp.zeros((30, 40))}}}},
        "head": {"classes": {"kernel": jnp.zeros((30, 10)), "bias": jnp.zeros(10)}},
    }
    assert not list(training_messages(OptimConfig(), params))
    factors = LrFactorsConfig(head=10.0, routers=0.0, others=0.5)
    (message,) = training_messages(OptimConfig(lr_factors=factors, layer_decay=0.75), params)
    assert message == (
        "training 1,510 of 1,510 parameters (head at 10 x lr, others at 0.5 x lr); each layer has "
        "0.75 times the lr of the next"
    )


@pytest.mark.process
def test_the_command_says_what_it_trains_and_resumes_a_linear_probe(tmp_path: Path) -> None:
    """A run continues from a checkpoint with the optimizer state of the head.

    If a part of the model is frozen, the FLOPs are unknown.
    """
    train = ["train", "--config", TINY, "--workdir", tmp_path, "--log-every", "10", *PROBE]
    train += ["--steps", "40", "--checkpoint-every", "30"]
    start = flatten_dict(jax.tree.map(np.array, init_state(configs.load(TINY)).params))
    sizes = {path: value.size for path, value in start.items()}
    head = sum(size for path, size in sizes.items() if path[0] == "head")
    for killed in (False, True):
        if killed:  # as if it had been, before it saved the last checkpoint
            shutil.rmtree(tmp_path / "checkpoints" / "40")
        result = vmoe(*train)
        assert result.returncode == 0, result.stderr
        line = f"training {head} of {sum(sizes.values()):,} parameters (head); frozen: "
        assert f"{line}routers, experts, others\n" in result.stderr
    assert "resumed from step 30 of 40" in result.stderr
    assert [row["step"] for row in rows(tmp_path)] == ["10", "20", "30", "40"]
    assert {path[0] for path in changed(start, parameters(tmp_path))} == {"head"}
    table = csv.DictReader((tmp_path / "metrics.csv").read_text().splitlines())
    assert {row["model_flops_per_second"] for row in table if row["images_per_second"]} == {""}
