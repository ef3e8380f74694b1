"""Auxiliary losses compared with their formulas in NumPy, and in numerically hard cases."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.special
import scipy.stats

from vmoe.config import AuxLossWeights, TokenChoice
from vmoe.routing import aux_losses

G, S, E, K = 3, 10, 4, 2


@pytest.fixture
def logits() -> jax.Array:
    return jax.random.normal(jax.random.key(0), (G, S, E))


@pytest.fixture
def valid() -> jax.Array:
    return jnp.arange(S) < jnp.array([[S], [6], [1]])


def squared_coefficient_of_variation(x: np.ndarray) -> float:
    return x.var() / x.mean() ** 2


def test_losses_equal_their_formulas_and_ignore_padding(
    logits: jax.Array, valid: jax.Array
) -> None:
    noisy = logits + 0.1 * jax.random.normal(jax.random.key(1), logits.shape)
    gates = jax.nn.softmax(noisy)
    router = TokenChoice(k=K, noise_std=0.5, aux_loss=AuxLossWeights(1.0, 1.0, 1.0, 1.0))
    losses = jax.jit(functools.partial(aux_losses.losses, router))(logits, noisy, gates, valid)
    real, losses = np.asarray(valid), jax.device_get(losses)
    for g in range(G):
        x, y, p = (np.asarray(a, np.float64)[g][real[g]] for a in (logits, noisy, gates))
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


def test_the_total_is_weighted_and_averaged_over_groups_with_real_tokens(logits: jax.Array) -> None:
    weights = AuxLossWeights(importance=0.5, load=0.0, gshard=0.25)
    router = TokenChoice(k=K, aux_loss=weights)
    valid = jnp.ones((G, S), bool).at[1].set(False)
    losses = aux_losses.losses(router, logits, None, jax.nn.softmax(logits), valid)
    per_group = 0.5 * losses["importance"] + 0.25 * losses["gshard"]
    expected = (per_group[0] + per_group[2]) / 2
    assert float(aux_losses.total(losses, weights, valid)) == pytest.approx(
        float(expected), rel=1e-6
    )


def test_a_loss_of_weight_0_is_not_computed_and_load_needs_noise(logits: jax.Array) -> None:
    valid, gates = jnp.ones((G, S), bool), jax.nn.softmax(logits)
    quiet = TokenChoice(aux_loss=AuxLossWeights(0.0, 0.0))
    assert aux_losses.losses(quiet, logits, logits, gates, valid) == {}
    assert aux_losses.losses(TokenChoice(), logits, None, gates, valid).keys() == {"importance"}


def test_gradients_are_finite_for_equal_gates_and_for_a_group_of_padding() -> None:
    zeros = jnp.zeros((2, S, E))
    valid = jnp.ones((2, S), bool).at[1].set(False)
    router = TokenChoice(aux_loss=AuxLossWeights(1.0, 1.0, 1.0, 1.0))

    def total(logits: jax.Array) -> jax.Array:
        noise = 0.1 * jax.random.normal(jax.random.key(0), logits.shape)
        gates = jax.nn.softmax(logits + noise)
        losses = aux_losses.losses(router, logits, logits + noise, gates, valid)
        return aux_losses.total(losses, router.aux_loss, valid)

    value, gradient = jax.jit(jax.value_and_grad(total))(zeros)
    assert np.isfinite(value) and np.isfinite(gradient).all()


def test_gshard_is_1_for_equal_loads_and_e_if_one_expert_gets_every_token() -> None:
    valid = jnp.ones((1, E), bool)
    even = 0.9 * jnp.eye(E)[None] + 0.1 / E
    assert float(aux_losses.gshard(even, valid)[0]) == pytest.approx(1.0)
    collapsed = jnp.tile(jnp.eye(E)[0], (1, E, 1))
    assert float(aux_losses.gshard(collapsed, valid)[0]) == pytest.approx(E)
