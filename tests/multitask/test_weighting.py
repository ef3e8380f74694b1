"""Weights of the tasks' losses, by the rules of their papers."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from vmoe.multitask.weighting import (
    LOG_VARIANCE,
    WEIGHTINGS,
    DynamicAverage,
    GradNorm,
    Losses,
    Uncertainty,
    Weighting,
    new_weighting,
)

LOSSES, ONES = jnp.array([4.0, 0.25]), jnp.ones(2)


def seen(
    losses: jax.Array, norms: jax.Array = ONES, labeled: tuple[bool, ...] = (True, True)
) -> tuple[Losses, jax.Array]:
    return Losses(losses, jnp.zeros(()), jnp.array(labeled, float)), norms


def after(
    weighting: Weighting, state: Any, observed: tuple[Losses, jax.Array], steps: int = 2000
) -> jax.Array:
    """The weights after steps that all see the same."""
    run = jax.jit(
        lambda state: jax.lax.fori_loop(0, steps, lambda _, s: weighting.step(s, *observed), state)
    )
    return weighting.weights(run(state))


def test_fixed_weights_stay_1() -> None:
    weighting = WEIGHTINGS["fixed"]()
    weights = after(weighting, weighting.init(2), seen(LOSSES), 1)
    np.testing.assert_array_equal(weights, [1, 1])


def test_a_learned_variance_becomes_twice_the_loss() -> None:
    """exp(-s) L + s / 2 is least at exp(s) = 2 L."""
    weighting = Uncertainty()
    weights = after(weighting, weighting.init(2), seen(LOSSES))
    np.testing.assert_allclose(weights, 1 / (2 * LOSSES), rtol=0.01)


def test_a_loss_of_zero_keeps_the_weight_finite() -> None:
    weighting = Uncertainty()
    weights = after(weighting, weighting.init(2), seen(jnp.zeros(2)), 10_000)
    np.testing.assert_allclose(weights, np.exp(LOG_VARIANCE), rtol=1e-5)


def test_gradnorm_makes_gradients_equal_if_progress_is_equal() -> None:
    weighting = GradNorm()
    norms = jnp.array([3.0, 1.0])
    weights = after(weighting, weighting.init(2), seen(LOSSES, norms))
    assert weights.sum() == pytest.approx(2)
    np.testing.assert_allclose(weights * norms, 1.5, rtol=0.1)


class Adam:
    """Adam (Kingma & Ba 2015, algorithm 1) in float64."""

    def __init__(self, rate: float):
        self.rate, self.steps, self.m, self.v = rate, 0, np.zeros(3), np.zeros(3)

    def __call__(self, gradient: np.ndarray) -> np.ndarray:
        """What is added to the values."""
        self.steps += 1
        self.m = 0.9 * self.m + 0.1 * gradient
        self.v = 0.999 * self.v + 0.001 * gradient**2
        m, v = self.m / (1 - 0.9**self.steps), self.v / (1 - 0.999**self.steps)
        return -self.rate * m / (np.sqrt(v) + 1e-8)


def random_steps(steps: int) -> tuple[np.ndarray, np.ndarray]:
    """Losses and norms of three tasks by step."""
    random = np.random.default_rng(0)
    return random.uniform(0.2, 3, (steps, 3)), random.uniform(0.1, 5, (steps, 3))


def weights_by_step(
    weighting: Weighting, losses: np.ndarray, norms: np.ndarray
) -> list[np.ndarray]:
    state, found = weighting.init(3), []
    step = jax.jit(lambda state, *each: weighting.step(state, *seen(*each, (True,) * 3)))
    for each in zip(losses, norms, strict=True):
        state = step(state, *map(jnp.asarray, each))
        found.append(np.asarray(weighting.weights(state)))
    return found


def test_gradnorm_is_the_papers_algorithm_step_by_step() -> None:
    """Chen et al. 2018, algorithm 1, in float64."""
    losses, norms = random_steps(12)
    weighting = GradNorm(alpha=0.7, learning_rate=0.1)
    weights, adam = np.ones(3), Adam(weighting.learning_rate)
    found = weights_by_step(weighting, losses, norms)
    for loss, norm, each in zip(losses, norms, found, strict=True):
        ratio = loss / losses[0]
        wanted = (weights * norm).mean() * (ratio / ratio.mean()) ** weighting.alpha
        weights = weights + adam(np.sign(weights * norm - wanted) * norm)
        weights = np.maximum(weights, GradNorm.LEAST)
        weights = weights * 3 / weights.sum()
        np.testing.assert_allclose(each, weights, rtol=1e-5)


def test_uncertainty_descends_the_gradient_of_its_loss_step_by_step() -> None:
    """Of exp(-s) L + s / 2 (Kendall et al. 2018) in float64."""
    losses, norms = random_steps(12)
    weighting = Uncertainty(learning_rate=0.1)
    s, adam = np.zeros(3), Adam(weighting.learning_rate)
    found = weights_by_step(weighting, losses, norms)
    for loss, each in zip(losses, found, strict=True):
        s = s + adam(0.5 - np.exp(-s) * loss)
        np.testing.assert_allclose(each, np.exp(-s), rtol=1e-5)


def test_gradnorm_gives_a_task_that_lags_larger_gradients() -> None:
    weighting = GradNorm()
    first = weighting.step(weighting.init(2), *seen(LOSSES))
    weights = after(weighting, first, seen(LOSSES * jnp.array([0.9, 0.3])))
    # the norms shall be in the ratio (0.9 / 0.3) ** 1.5, as far as their sum allows
    assert weights[0] / weights[1] == pytest.approx(3**1.5, rel=0.3)


def test_the_settings_of_a_weighting_replace_those_of_its_paper() -> None:
    """With alpha = 0 gradients are equal whatever the progress; a low temperature is a maximum."""
    weighting = new_weighting("gradnorm", {"alpha": 1e-9, "learning_rate": 0.01})
    first = weighting.step(weighting.init(2), *seen(LOSSES))
    weights = after(weighting, first, seen(LOSSES * jnp.array([0.9, 0.3])))
    np.testing.assert_allclose(weights, 1, rtol=0.1)
    weighting = new_weighting("dynamic_average", {"temperature": 0.01})
    state = weighting.epoch(weighting.init(2), jnp.array([2.0, 2.0]))
    state = weighting.epoch(state, jnp.array([2.0, 1.0]))
    np.testing.assert_allclose(weighting.weights(state), [2, 0], atol=1e-6)


def test_dynamic_average_weighs_by_the_ratio_of_the_last_two_epochs() -> None:
    weighting = DynamicAverage()
    state = weighting.init(2)
    np.testing.assert_allclose(weighting.weights(state), 1)
    state = weighting.epoch(state, jnp.array([2.0, 2.0]))
    np.testing.assert_allclose(weighting.weights(state), 1)
    state = weighting.epoch(state, jnp.array([2.0, 1.0]))
    powers = np.exp(np.array([1.0, 0.5]) / 2)
    np.testing.assert_allclose(weighting.weights(state), 2 * powers / powers.sum(), rtol=1e-6)


@pytest.mark.parametrize("name", WEIGHTINGS)
def test_a_task_without_a_label_in_the_batch_keeps_its_weight(name: str) -> None:
    weighting = WEIGHTINGS[name]()
    first = weighting.step(weighting.init(2), *seen(LOSSES, jnp.array([3.0, 1.0])))
    before = weighting.weights(first)
    without = seen(LOSSES.at[1].set(0.0), jnp.array([3.0, 0.0]), (True, False))
    weights = after(weighting, first, without, 200)
    if name == "gradnorm":  # its weights are scaled to sum to the number of tasks
        weights, before = weights / weights[0], before / before[0]
    assert np.isfinite(weights).all()
    np.testing.assert_allclose(weights[1], before[1], rtol=0.05)


@pytest.mark.parametrize("name", WEIGHTINGS)
def test_a_batch_without_any_label_changes_nothing(name: str) -> None:
    weighting = WEIGHTINGS[name]()
    weights = after(weighting, weighting.init(2), seen(0 * LOSSES, 0 * ONES, (False, False)), 10)
    np.testing.assert_allclose(weights, [1, 1], rtol=1e-6)
