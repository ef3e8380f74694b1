"""Auxiliary losses compared with their formulas in NumPy, and in numerically hard cases."""

import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.special
import scipy.stats

from vmoe.axes import RouterInputs
from vmoe.config import AuxLossWeights, TokenChoice
from vmoe.routing import aux_losses

G, S, E, K = 3, 10, 4, 2


@pytest.fixture
def logits() -> np.ndarray:
    return np.random.default_rng(0).normal(size=(G, S, E)).astype(np.float32)


@pytest.fixture
def valid() -> np.ndarray:
    return np.arange(S) < np.array([[S], [6], [1]])


def losses_by(router: TokenChoice) -> Callable[..., dict[str, jax.Array]]:
    return jax.jit(functools.partial(losses_of, router))


def losses_of(
    router: TokenChoice,
    logits: jax.Array,
    noisy: jax.Array | None,
    gates: jax.Array,
    valid: jax.Array,
) -> dict[str, jax.Array]:
    inputs = RouterInputs(logits, None if noisy is None else noisy - logits, valid, draw=None)
    return router.losses(inputs, inputs.noisy_logits, gates)


def squared_coefficient_of_variation(x: np.ndarray) -> float:
    return x.var() / x.mean() ** 2


def test_losses_equal_their_formulas_and_ignore_padding(
    logits: np.ndarray, valid: np.ndarray
) -> None:
    noisy = logits + np.float32(0.1) * logits[::-1, ::-1, ::-1]
    gates = scipy.special.softmax(noisy, axis=-1)
    router = TokenChoice(k=K, noise_std=0.5, aux_loss=AuxLossWeights(1.0, 1.0, 1.0, 1.0))
    losses = jax.device_get(losses_by(router)(logits, noisy, gates, valid))
    for g in range(G):
        x, y, p = (np.asarray(a, np.float64)[g][valid[g]] for a in (logits, noisy, gates))
        clean = scipy.special.softmax(x, axis=1)
        threshold = -np.sort(-y, axis=1)[:, K - 1 : K]
        load = 1 - scipy.stats.norm.cdf((threshold - x) * E / 0.5)
        first = np.eye(E)[p.argmax(1)]
        expected = {
            "importance": squared_coefficient_of_variation(clean.sum(0)),
            "load": squared_coefficient_of_variation(load.mean(0)),
            "gshard": E**2 * (first.mean(0) * p.mean(0)).mean(),
            "z": (scipy.special.logsumexp(x, axis=1) ** 2).mean(),
        }
        assert losses.keys() == expected.keys()
        for name, value in expected.items():
            assert float(losses[name][g]) == pytest.approx(value, rel=1e-5), name


def test_the_total_is_weighted_and_averaged_over_groups_with_real_tokens(
    logits: np.ndarray,
) -> None:
    weights = AuxLossWeights(importance=0.5, load=0.0, gshard=0.25)
    router = TokenChoice(k=K, aux_loss=weights)
    valid = np.arange(G)[:, None] != np.ones((1, S))
    gates = scipy.special.softmax(logits, axis=-1)
    losses = jax.device_get(losses_by(router)(logits, None, gates, valid))
    per_group = 0.5 * losses["importance"] + 0.25 * losses["gshard"]
    expected = (per_group[0] + per_group[2]) / 2
    total = jax.jit(lambda losses, valid: aux_losses.total(losses, weights, valid))
    assert float(total(losses, valid)) == pytest.approx(float(expected), rel=1e-6)


def test_a_loss_of_weight_0_is_not_computed_and_load_needs_noise(
    logits: np.ndarray, valid: np.ndarray
) -> None:
    quiet, gates = TokenChoice(aux_loss=AuxLossWeights(0.0, 0.0)), logits
    assert jax.eval_shape(losses_by(quiet), logits, logits, gates, valid) == {}
    computed = jax.eval_shape(losses_by(TokenChoice()), logits, None, gates, valid)
    assert computed.keys() == {"importance"}


def test_gradients_are_finite_for_equal_gates_and_for_a_group_of_padding() -> None:
    zeros = np.zeros((2, S, E), np.float32)
    valid = jnp.asarray(np.arange(2)[:, None] != np.ones((1, S)))
    router = TokenChoice(aux_loss=AuxLossWeights(1.0, 1.0, 1.0, 1.0))

    def total(logits: jax.Array) -> jax.Array:
        noise = 0.1 * jax.random.normal(jax.random.key(0), logits.shape)
        gates = jax.nn.softmax(logits + noise)
        losses = losses_of(router, logits, logits + noise, gates, valid)
        return aux_losses.total(losses, router.aux_loss, valid)

    value, gradient = jax.jit(jax.value_and_grad(total))(zeros)
    assert np.isfinite(value) and np.isfinite(gradient).all()


def test_gshard_is_1_for_equal_loads_and_e_if_one_expert_gets_every_token() -> None:
    one_each = np.eye(E, dtype=np.float32)
    even = 0.9 * one_each[None] + 0.1 / E
    collapsed = np.tile(one_each[0], (1, E, 1))
    gshard, valid = jax.jit(aux_losses.gshard), np.ones((1, E), bool)
    assert float(gshard(even, valid)[0]) == pytest.approx(1.0)
    assert float(gshard(collapsed, valid)[0]) == pytest.approx(E)
