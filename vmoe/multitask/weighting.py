"""How much the loss of each task counts: fixed, by uncertainty, by gradients, or by progress."""

from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Bool, Float

LEARNING_RATE = 0.025  # of learned weights, by Adam
LOG_VARIANCE = 10.0  # the largest absolute value of one that is learned


class Losses(NamedTuple):
    """Mean losses.

    Attributes:
        tasks: the mean loss of each task over its labeled rows; 0 if it has none.
        gates: the loss of the gates.
        labels: the number of labeled rows of each task.
    """

    tasks: Float[Array, "t"]
    gates: Float[Array, ""]
    labels: Float[Array, "t"]


class Weighting:
    """Weights of the tasks' losses.

    This class keeps the given weights; a subclass multiplies them by learned ones.

    Attributes:
        needs_norms: whether ``step`` needs the norms of gradients, which take a backward pass for
            each task.
    """

    needs_norms = False

    def __init__(self, weights: Sequence[float]):
        self.factors, self.given = tuple(weights), jnp.array(weights, jnp.float32)

    def init(self) -> Any:
        """The first state."""
        return {}

    def weights(self, state: Any) -> Float[Array, "t"]:
        """The factor of each task's loss."""
        return self.given

    def step(self, state: Any, losses: Losses, norms: Float[Array, "t"]) -> Any:
        """The state after a training step. Tasks without a label in the batch change nothing.

        Args:
            losses: of the step.
            norms: the norm of each loss's gradient for the parameters of the body; zeros unless
                the weighting ``needs_norms``.
        """
        return state

    def epoch(self, state: Any, losses: Float[Array, "t"]) -> Any:
        """The state after an epoch with these mean losses."""
        return state


class Uncertainty(Weighting):
    """A learned variance of each task (Kendall, Gal & Cipolla 2018, section 3).

    The loss of a task is exp(-s) L + s / 2, where s is the logarithm of its variance. The same form
    serves all kinds of tasks. In the paper, L is half the squared error of a regression; here it is
    all of it, which only changes s by a constant. Adam learns s, at a rate of its own
    (``LEARNING_RATE``), within ±``LOG_VARIANCE``: a loss of zero would lower it forever.
    """

    def init(self) -> Any:
        log_variances = jnp.zeros_like(self.given)
        return log_variances, optax.adam(LEARNING_RATE).init(log_variances)

    def weights(self, state: Any) -> Float[Array, "t"]:
        return self.given * jnp.exp(-state[0])

    def step(self, state: Any, losses: Losses, norms: Float[Array, "t"]) -> Any:
        (log_variances, moments), labeled = state, losses.labels > 0
        gradient = jnp.where(labeled, 0.5 - jnp.exp(-log_variances) * losses.tasks, 0.0)
        moved, moments = adam_step(log_variances, gradient, moments, labeled)
        return jnp.clip(moved, -LOG_VARIANCE, LOG_VARIANCE), moments


class GradNorm(Weighting):
    """Larger gradients for tasks whose loss falls slowly (Chen et al. 2018, algorithm 1).

    With G_i = w_i |grad L_i|, and r_i = L_i / L_i(first) divided by its mean over the tasks, Adam
    changes the weights w to lower

        sum_i |G_i - mean(G) r_i^a|,

    where mean(G) r_i^a is held constant, a is ``ASYMMETRY`` and the rate ``LEARNING_RATE``. Then
    the weights, each at least ``LEAST``, are scaled to sum to t. The paper takes gradients for the
    last shared layer; here they are for all parameters of the body.
    """

    needs_norms = True
    ASYMMETRY = 1.5
    LEAST = 1e-3

    def init(self) -> Any:
        ones = jnp.ones_like(self.given)
        return {
            "weights": ones,
            "first": jnp.zeros_like(ones),  # the first loss of each task; 0 until it has one
            "moments": optax.adam(LEARNING_RATE).init(ones),
        }

    def weights(self, state: Any) -> Float[Array, "t"]:
        return self.given * state["weights"]

    def step(self, state: Any, losses: Losses, norms: Float[Array, "t"]) -> Any:
        known = losses.labels > 0
        labeled = known & (known.sum() > 1)  # one task has none to compare with
        weights = state["weights"]

        def mean(x: Array) -> Array:
            return jnp.where(labeled, x, 0.0).sum() / jnp.maximum(labeled.sum(), 1)

        first = jnp.where(known & (state["first"] == 0), losses.tasks, state["first"])
        ratio = losses.tasks / jnp.maximum(first, 1e-12)
        rate = ratio / jnp.maximum(mean(ratio), 1e-12)
        weighted = weights * norms
        wanted = mean(weighted) * rate**self.ASYMMETRY
        # the gradient of sum |weighted - wanted|
        gradient = jnp.where(labeled, jnp.sign(weighted - wanted) * norms, 0.0)
        moved, moments = adam_step(weights, gradient, state["moments"], labeled)
        moved = jnp.maximum(moved, self.LEAST)
        return {"weights": moved * len(moved) / moved.sum(), "first": first, "moments": moments}


class DynamicAverage(Weighting):
    """Tasks whose loss falls slowly count more (Liu, Johns & Davison 2019, eq. 7).

    The weights are t * softmax(r / ``TEMPERATURE``), where r is the loss of the last epoch divided
    by that of the one before; 1 in the first two epochs.
    """

    TEMPERATURE = 2.0

    def init(self) -> Any:
        return {"last": jnp.zeros_like(self.given), "before": jnp.zeros_like(self.given)}

    def weights(self, state: Any) -> Float[Array, "t"]:
        known = state["before"] > 0
        ratio = jnp.where(known, state["last"] / jnp.where(known, state["before"], 1.0), 1.0)
        return self.given * len(ratio) * jax.nn.softmax(ratio / self.TEMPERATURE)

    def epoch(self, state: Any, losses: Float[Array, "t"]) -> Any:
        return {"last": losses, "before": state["last"]}


def adam_step(
    values: Float[Array, "t"], gradient: Float[Array, "t"], moments: Any, labeled: Bool[Array, "t"]
) -> tuple[Float[Array, "t"], Any]:
    """The values of labeled tasks after a step of Adam, and its moments."""
    updates, moments = optax.adam(LEARNING_RATE).update(gradient, moments)
    return values + jnp.where(labeled, jnp.asarray(updates), 0.0), moments


WEIGHTINGS: dict[str, type[Weighting]] = {
    "fixed": Weighting,
    "uncertainty": Uncertainty,
    "gradnorm": GradNorm,
    "dynamic_average": DynamicAverage,
}
