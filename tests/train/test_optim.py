"""The optimiser compared with its formulas."""

import json
from pathlib import Path
from typing import Any

import jax
import numpy as np
import optax
import pytest

from vmoe import models
from vmoe.config import OptimConfig, TrainConfig, WeightDecayConfig
from vmoe.train.optim import decay_kind, optimizer, schedule

PARAMS = {
    "blocks": {
        1: {
            "mlp": {
                "experts": {
                    "up": {"kernel": np.ones(3, np.float32), "bias": np.ones(3, np.float32)}
                },
                "router": {"kernel": np.ones(3, np.float32)},
            },
            "attention": {"query": {"kernel": np.ones(3, np.float32)}},
        }
    },
    "head": {"classes": {"kernel": np.ones(3, np.float32)}},
    "positions": {"embedding": np.ones(3, np.float32)},
}


@pytest.mark.parametrize(
    ("kind", "expected"),
    [
        ("cosine", [0.0, 1.0, 2.0, (2.0 + 0.2) / 2, 0.2]),
        ("linear", [0.0, 1.0, 2.0, (2.0 + 0.2) / 2, 0.2]),
        ("constant", [0.0, 1.0, 2.0, 2.0, 2.0]),
    ],
)
def test_the_learning_rate_rises_linearly_and_then_follows_its_schedule(
    kind: str, expected: list[float]
) -> None:
    rate = schedule(OptimConfig(lr=2.0, warmup_steps=10, end_lr=0.2, schedule=kind), 110)
    assert [float(rate(step)) for step in (0, 5, 10, 60, 110)] == pytest.approx(expected)
    quarter = {"cosine": 0.2 + 1.8 * (1 + np.cos(np.pi / 4)) / 2, "linear": 1.55, "constant": 2.0}
    assert float(rate(35)) == pytest.approx(quarter[kind])


@pytest.mark.parametrize("name", ["s32_linear", "finetune_cosine"])
def test_schedules_equal_the_published_ones(name: str) -> None:
    stored = np.load(Path(__file__).parents[1] / "golden" / "optim" / "schedules.npz")
    theirs = json.loads(str(stored["config"]))[name]
    config = OptimConfig(
        lr=theirs["peak_value"],
        end_lr=theirs["end_value"],
        warmup_steps=theirs["warmup_steps"],
        schedule=name.split("_")[1],
    )
    ours = schedule(config, theirs["total_steps"])(stored[f"{name}/steps"])
    tolerance = dict(rtol=1e-5, atol=1e-7 * config.lr)
    np.testing.assert_allclose(ours, stored[f"{name}/values"], **tolerance)


def test_without_warmup_the_first_step_has_the_peak_rate() -> None:
    assert float(schedule(OptimConfig(lr=2.0, warmup_steps=0), 10)(0)) == pytest.approx(2.0)


def run(**optim: Any) -> TrainConfig:
    """A run of 10 steps without warmup."""
    return TrainConfig(optim=OptimConfig(warmup_steps=0, **optim), steps=10)


def after_decay(decay: WeightDecayConfig) -> dict[str, float]:
    """Parameters of 1 after a step with zero gradient, by their path."""
    optim = optimizer(run(lr=0.5, weight_decay=decay))
    updates, _ = optim.update(jax.tree.map(np.zeros_like, PARAMS), optim.init(PARAMS), PARAMS)
    after = optax.apply_updates(PARAMS, updates)
    return {
        jax.tree_util.keystr(path, simple=True, separator="/"): float(leaf[0])
        for path, leaf in jax.tree.leaves_with_path(after)
    }


def test_weight_decay_shrinks_each_kind_of_parameter_at_its_own_rate() -> None:
    values = after_decay(
        WeightDecayConfig(kernels=0.1, experts=0.2, routers=0.0, head=0.3, others=0.4)
    )
    assert values == pytest.approx(
        {
            "blocks/1/attention/query/kernel": 1 - 0.05,
            "blocks/1/mlp/experts/up/kernel": 1 - 0.1,
            "blocks/1/mlp/experts/up/bias": 1 - 0.2,
            "blocks/1/mlp/router/kernel": 1.0,
            "head/classes/kernel": 1 - 0.15,
            "positions/embedding": 1 - 0.2,
        }
    )


def test_by_default_all_kernels_decay_equally_and_nothing_else_decays() -> None:
    for name, value in after_decay(WeightDecayConfig(kernels=0.1)).items():
        assert value == pytest.approx(0.95 if name.endswith("kernel") else 1.0), name


def test_every_parameter_of_a_model_has_a_kind_of_weight_decay() -> None:
    from flax import nnx

    model = models.build_abstract(models.model_config("vmoe_tiny_last2_e4"))
    kinds = {
        decay_kind(tuple(map(str, p))) for p, _ in nnx.to_flat_state(nnx.state(model, nnx.Param))
    }
    assert kinds == {"kernels", "experts", "routers", "head", "others"}


def test_sgd_applies_momentum_then_decoupled_weight_decay() -> None:
    config = run(
        kind="sgd", lr=0.1, schedule="constant", momentum=0.8, grad_clip_norm=None,
        weight_decay=WeightDecayConfig(kernels=0.5),
    )  # fmt: skip
    optim = optimizer(config)
    params = {"kernel": np.ones(2, np.float64)}
    state, expected, trace = optim.init(params), 1.0, 0.0
    for gradient in (1.0, -2.0, 3.0):
        updates, state = optim.update({"kernel": np.full(2, gradient)}, state, params)
        params = optax.apply_updates(params, updates)
        trace = gradient + 0.8 * trace
        expected -= 0.1 * (trace + 0.5 * expected)
        np.testing.assert_allclose(params["kernel"], expected, rtol=1e-6)


@pytest.mark.parametrize("clip", [None, 1.0])
def test_the_gradient_is_clipped_by_its_global_norm_unless_disabled(clip: float | None) -> None:
    optim = optimizer(run(kind="sgd", lr=1.0, grad_clip_norm=clip, momentum=0.0))
    params = {"bias": np.zeros(2, np.float32)}
    gradient = {"bias": np.array([3.0, 4.0], np.float32)}
    updates, _ = optim.update(gradient, optim.init(params), params)
    np.testing.assert_allclose(updates["bias"], -gradient["bias"] / (5 if clip else 1), rtol=1e-6)
