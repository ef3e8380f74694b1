"""The optimizer compared with its formulas."""

import json
from functools import partial
from pathlib import Path
from typing import Any

import jax
import numpy as np
import optax
import pytest
from flax.traverse_util import unflatten_dict

from vmoe import models
from vmoe.config import OptimConfig, TrainConfig, WeightDecayConfig, replace
from vmoe.train.optim import decay_kind, optimizer, schedule

PARAMS = {
    "blocks": {
        1: {
            "mlp": {
                "experts": {
                    "up": {"kernel": np.ones(3, np.float32), "bias": np.ones(3, np.float32)}
                },
                "gate": {"kernel": np.ones(3, np.float32)},
            },
            "attention": {"query": {"kernel": np.ones(3, np.float32)}},
        }
    },
    "head": {"classes": {"kernel": np.ones(3, np.float32)}},
    "positions": {"embedding": np.ones(3, np.float32)},
}


@pytest.mark.parametrize(
    ("fields", "expected"),
    [
        (dict(end_lr=0.2), [0.2 + 1.8 * (1 + np.cos(np.pi / 4)) / 2, 1.1, 0.2]),
        (dict(schedule="linear", end_lr=0.2), [1.55, 1.1, 0.2]),
        (dict(schedule="polynomial", end_lr=0.2, power=3.0), [0.2 + 1.8 * 0.75**3, 0.425, 0.2]),
        (dict(schedule="constant"), [2.0, 2.0, 2.0]),
        (dict(schedule="constant", cooldown_steps=80), [2.0 * 75 / 80, 1.25, 0.0]),
        (dict(schedule="rsqrt", timescale=50), [2 / np.sqrt(1.5), 2 / np.sqrt(2), 2 / np.sqrt(3)]),
    ],
)
def test_the_learning_rate_rises_linearly_and_then_follows_its_schedule(
    fields: dict[str, Any], expected: list[float]
) -> None:
    rate = schedule(OptimConfig(lr=2.0, warmup_steps=10, **fields), 110)
    ours = [float(rate(step)) for step in (0, 5, 10, 35, 60, 110)]
    assert ours == pytest.approx([0.0, 1.0, 2.0, *expected])


def published_optim(theirs: dict[str, Any]) -> dict[str, Any]:
    """The fields of an ``OptimConfig`` for settings of the authors' code."""
    kinds = {"adam": "adamw", "big_vision_adafactor": "adafactor"}
    rate = dict(theirs["learning_rate"])
    name = rate.pop("schedule").removeprefix("big_vision_").removeprefix("warmup_")
    rate = {{"peak_value": "lr", "end_value": "end_lr"}.get(k, k): v for k, v in rate.items()}
    decay = theirs.get("weight_decay", 0.0)
    kernels = decay if isinstance(decay, float) else decay[0][1]  # of the pattern ".*/kernel"
    others = decay if isinstance(decay, float) else 0.0
    used = ("b1", "b2", "momentum", "min_dim_size_to_factor")
    return dict(
        kind=kinds.get(theirs["name"], theirs["name"]),
        schedule=name.removesuffix("_decay"),
        weight_decay=WeightDecayConfig(kernels=kernels, others=others),
        grad_clip_norm=theirs["gradient_clip"]["global_norm"],
        **rate,
        **{key: theirs[key] for key in used if key in theirs},
    )


@pytest.mark.parametrize(
    "name",
    ["s32_linear", "finetune_cosine", "polynomial2", "rsqrt_no_cooldown", "soft_rsqrt_cooldown"],
)
def test_schedules_equal_the_published_ones(name: str) -> None:
    stored = stored_run("schedules")
    rate = json.loads(str(stored["config"]))[name]
    total_steps = rate.pop("total_steps")
    theirs = {"name": "adam", "gradient_clip": {"global_norm": 1.0}, "learning_rate": rate}
    config = OptimConfig(**published_optim(theirs))
    ours = schedule(config, total_steps)(stored[f"{name}/steps"])
    # Theirs is negative after the last step of a cooldown.
    expected = np.maximum(stored[f"{name}/values"], 0)
    np.testing.assert_allclose(ours, expected, rtol=1e-5, atol=1e-7 * config.lr)


@pytest.mark.parametrize("name", ["adam_s32", "sgd_finetune", "adafactor"])
def test_twelve_steps_equal_those_of_the_authors_code(name: str) -> None:
    stored = stored_run(name)
    theirs = json.loads(str(stored["config"]))
    config = OptimConfig(**published_optim(theirs))
    gradients = tree_of(stored, "grads")
    if name == "adafactor":  # its largest arrays are cut, so their norm is not the clipped one
        factor = np.minimum(1, 1.0 / stored["grad_norm"])
        gradients = jax.tree.map(lambda g: (g.T * factor).T, gradients)
        config = replace(config, grad_clip_norm=None)
    optim = optimizer(TrainConfig(optim=config, steps=theirs["total_steps"]))
    params = tree_of(stored, "params")
    state, update = jax.jit(optim.init)(params), update_of(optim)
    for step in range(12):
        params, state = update(jax.tree.map(lambda g, i=step: g[i], gradients), state, params)
        if expected := tree_of(stored, f"params_after/{step + 1}"):
            jax.tree.map(partial(np.testing.assert_allclose, rtol=0, atol=1e-6), params, expected)


def update_of(optim: optax.GradientTransformation) -> jax.stages.Wrapped:
    """The parameters and the state after a gradient, as one program."""

    def update(gradient: Any, state: Any, params: Any) -> Any:
        updates, state = optim.update(gradient, state, params)
        return optax.apply_updates(params, updates), state

    return jax.jit(update)


def stored_run(name: str) -> dict[str, np.ndarray]:
    with np.load(Path(__file__).parents[1] / "golden" / "optim" / f"{name}.npz") as file:
        return dict(file)


def tree_of(stored: dict[str, np.ndarray], prefix: str) -> dict[str, Any]:
    return unflatten_dict(
        {
            tuple(name.removeprefix(f"{prefix}/").split("/")): array
            for name, array in stored.items()
            if name.startswith(f"{prefix}/")
        }
    )


def test_without_warmup_the_first_step_has_the_peak_rate() -> None:
    assert float(schedule(OptimConfig(lr=2.0, warmup_steps=0), 10)(0)) == pytest.approx(2.0)


def run(**optim: Any) -> TrainConfig:
    """A run of 10 steps without warmup."""
    return TrainConfig(optim=OptimConfig(warmup_steps=0, **optim), steps=10)


def after_decay(decay: WeightDecayConfig, kind: str = "adamw") -> dict[str, float]:
    """Parameters of 1 after a step with zero gradient, by their path."""
    optim = optimizer(run(kind=kind, lr=0.5, weight_decay=decay))
    updates, _ = optim.update(jax.tree.map(np.zeros_like, PARAMS), optim.init(PARAMS), PARAMS)
    after = optax.apply_updates(PARAMS, updates)
    return {
        jax.tree_util.keystr(path, simple=True, separator="/"): float(leaf[0])
        for path, leaf in jax.tree.leaves_with_path(after)
    }


@pytest.mark.parametrize("kind", ["adamw", "sgd", "adafactor", "lion"])
def test_weight_decay_shrinks_each_kind_of_parameter_at_its_own_rate(kind: str) -> None:
    rates = WeightDecayConfig(kernels=0.1, experts=0.2, routers=0.0, head=0.3, others=0.4)
    values = after_decay(rates, kind)
    assert values == pytest.approx(
        {
            "blocks/1/attention/query/kernel": 1 - 0.05,
            "blocks/1/mlp/experts/up/kernel": 1 - 0.1,
            "blocks/1/mlp/experts/up/bias": 1 - 0.2,
            "blocks/1/mlp/gate/kernel": 1.0,
            "head/classes/kernel": 1 - 0.15,
            "positions/embedding": 1 - 0.2,
        }
    )


def test_by_default_all_kernels_decay_equally_and_nothing_else_decays() -> None:
    for name, value in after_decay(WeightDecayConfig(kernels=0.1)).items():
        assert value == pytest.approx(0.95 if name.endswith("kernel") else 1.0), name


def test_every_parameter_of_a_model_has_a_kind_of_weight_decay() -> None:
    from flax import nnx

    model = models.build_abstract(models.model_config("vmoe_test_last2_e4"))
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


@pytest.mark.parametrize(("b2", "decay"), [(None, 0.99), (0.6, 0.6)])
def test_lion_steps_by_the_sign_of_the_gradient_mixed_with_its_momentum(
    b2: float | None, decay: float
) -> None:
    config = run(
        kind="lion", lr=0.1, schedule="constant", b1=0.8, b2=b2, grad_clip_norm=None,
        weight_decay=WeightDecayConfig(kernels=0.5),
    )  # fmt: skip
    optim = optimizer(config)
    params = {"kernel": np.ones(2, np.float32)}
    state, expected, momentum = optim.init(params), 1.0, 0.0
    for gradient in (1.0, -0.02, -0.1, 2.0):  # the signs depend on b2
        updates, state = optim.update({"kernel": np.full(2, gradient, "f4")}, state, params)
        params = optax.apply_updates(params, updates)
        expected -= 0.1 * (np.sign(0.8 * momentum + 0.2 * gradient) + 0.5 * expected)
        momentum = decay * momentum + (1 - decay) * gradient
        np.testing.assert_allclose(params["kernel"], expected, rtol=1e-6)


def test_adafactors_decay_of_squares_grows_up_to_b2() -> None:
    config = run(
        kind="adafactor", lr=0.1, schedule="constant", b2=0.5, momentum=0.8, grad_clip_norm=None
    )
    optim = optimizer(config)
    params = {"bias": np.zeros(2, np.float32)}  # too small to be factored
    state, expected, squares, mean = optim.init(params), 0.0, 0.0, 0.0
    for gradient, decay in ((1.0, 0.0), (-2.0, 1 - 2**-0.8), (3.0, 0.5), (0.5, 0.5)):
        updates, state = optim.update({"bias": np.full(2, gradient, "f4")}, state, params)
        params = optax.apply_updates(params, updates)
        squares = decay * squares + (1 - decay) * gradient**2
        mean = 0.8 * mean + 0.2 * gradient / np.sqrt(squares)
        expected -= 0.1 * mean
        np.testing.assert_allclose(params["bias"], expected, rtol=1e-5)


@pytest.mark.parametrize("kind", ["adamw", "sgd", "adafactor", "lion"])
def test_a_momentum_in_bfloat16_takes_half_the_memory_and_steps_almost_equally(kind: str) -> None:
    gradients = np.random.default_rng(0).normal(1, 0.3, (5, 40, 48)).astype(np.float32)
    after, sizes = [], []
    for dtype in ("float32", "bfloat16"):
        optim = optimizer(run(kind=kind, lr=0.1, momentum_dtype=dtype))
        params = {"kernel": np.zeros((40, 48), np.float32)}
        state, update = jax.jit(optim.init)(params), update_of(optim)
        for gradient in gradients:
            params, state = update({"kernel": gradient}, state, params)
        after.append(params["kernel"])
        moments = [x for x in jax.tree.leaves(state) if x.dtype == dtype and x.size == 40 * 48]
        sizes.append(moments[0].nbytes)
    assert sizes == [40 * 48 * 4, 40 * 48 * 2]
    np.testing.assert_allclose(*after, rtol=0.02)
    assert np.any(after[0] != after[1]) or kind == "lion"


@pytest.mark.parametrize("clip", [None, 1.0])
def test_the_gradient_is_clipped_by_its_global_norm_unless_disabled(clip: float | None) -> None:
    optim = optimizer(run(kind="sgd", lr=1.0, grad_clip_norm=clip, momentum=0.0))
    params = {"bias": np.zeros(2, np.float32)}
    gradient = {"bias": np.array([3.0, 4.0], np.float32)}
    updates, _ = optim.update(gradient, optim.init(params), params)
    np.testing.assert_allclose(updates["bias"], -gradient["bias"] / (5 if clip else 1), rtol=1e-6)
