"""How much the loss of each task counts: fixed, by uncertainty, by gradients, or by progress."""

from collections.abc import Mapping
from dataclasses import dataclass, fields
from numbers import Real
from typing import Any, ClassVar, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Bool, Float

LOG_VARIANCE = 10.0  # the largest absolute value of one that is learned


class Losses(NamedTuple):
    """Mean losses.

    Attributes:
        tasks: the mean loss of each task over its labeled rows; 0 if it has none.
        gates: the loss of the gates.
        labels: the number of labeled rows of each task, or the sum of their weights.
    """

    tasks: Float[Array, "t"]
    gates: Float[Array, ""]
    labels: Float[Array, "t"]


@dataclass(frozen=True)
class Weighting:
    """Weights of the tasks' losses, by which their given factors are multiplied.

    This class keeps them at 1; a subclass learns them. Its fields are its settings.

    Attributes:
        needs_norms: whether ``step`` needs the norms of gradients, which take a backward pass for
            each task.
    """

    needs_norms: ClassVar[bool] = False

    def init(self, tasks: int) -> Any:
        """The first state, for a number of tasks."""
        return jnp.ones(tasks)

    def weights(self, state: Any) -> Float[Array, "t"]:
        """The weight of each task's loss."""
        return state

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


@dataclass(frozen=True)
class Uncertainty(Weighting):
    """A learned variance of each task (Kendall, Gal & Cipolla 2018, section 3).

    The loss of a task is exp(-s) L + s / 2, where s is the logarithm of its variance. The same form
    serves all kinds of tasks. In the paper, L is half the squared error of a regression; here it is
    all of it, which only changes s by a constant. Adam learns s, at a rate of its own
    (``learning_rate``), within ±``LOG_VARIANCE``: a loss of zero would lower it forever.
    """

    learning_rate: float = 0.025

    def init(self, tasks: int) -> Any:
        log_variances = jnp.zeros(tasks)
        return log_variances, optax.adam(self.learning_rate).init(log_variances)

    def weights(self, state: Any) -> Float[Array, "t"]:
        return jnp.exp(-state[0])

    def step(self, state: Any, losses: Losses, norms: Float[Array, "t"]) -> Any:
        (log_variances, moments), labeled = state, losses.labels > 0
        gradient = jnp.where(labeled, 0.5 - jnp.exp(-log_variances) * losses.tasks, 0.0)
        moved, moments = adam_step(self.learning_rate, log_variances, gradient, moments, labeled)
        return jnp.clip(moved, -LOG_VARIANCE, LOG_VARIANCE), moments


@dataclass(frozen=True)
class GradNorm(Weighting):
    """Larger gradients for tasks whose loss falls slowly (Chen et al. 2018, algorithm 1).

    With G_i = w_i |grad L_i|, and r_i = L_i / L_i(first) divided by its mean over the tasks, Adam
    changes the weights w to lower

        sum_i |G_i - mean(G) r_i^a|,

    where mean(G) r_i^a is held constant, a is ``alpha`` and the rate ``learning_rate``. Then the
    weights, each at least ``LEAST``, are scaled to sum to t. The paper takes gradients for the last
    shared layer; here they are for all parameters of the body.
    """

    alpha: float = 1.5
    learning_rate: float = 0.025

    needs_norms: ClassVar[bool] = True
    LEAST: ClassVar[float] = 1e-3

    def init(self, tasks: int) -> Any:
        ones = jnp.ones(tasks)
        return {
            "weights": ones,
            "first": jnp.zeros_like(ones),  # the first loss of each task; 0 until it has one
            "moments": optax.adam(self.learning_rate).init(ones),
        }

    def weights(self, state: Any) -> Float[Array, "t"]:
        return state["weights"]

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
        wanted = mean(weighted) * rate**self.alpha
        # the gradient of sum |weighted - wanted|
        gradient = jnp.where(labeled, jnp.sign(weighted - wanted) * norms, 0.0)
        moved, moments = adam_step(self.learning_rate, weights, gradient, state["moments"], labeled)
        moved = jnp.maximum(moved, self.LEAST)
        return {"weights": moved * len(moved) / moved.sum(), "first": first, "moments": moments}


@dataclass(frozen=True)
class DynamicAverage(Weighting):
    """Tasks whose loss falls slowly count more (Liu, Johns & Davison 2019, eq. 7).

    The weights are t * softmax(r / ``temperature``), where r is the loss of the last epoch divided
    by that of the one before; 1 in the first two epochs.
    """

    temperature: float = 2.0

    def init(self, tasks: int) -> Any:
        return {"last": jnp.zeros(tasks), "before": jnp.zeros(tasks)}

    def weights(self, state: Any) -> Float[Array, "t"]:
        known = state["before"] > 0
        ratio = jnp.where(known, state["last"] / jnp.where(known, state["before"], 1.0), 1.0)
        return len(ratio) * jax.nn.softmax(ratio / self.temperature)

    def epoch(self, state: Any, losses: Float[Array, "t"]) -> Any:
        return {"last": losses, "before": state["last"]}


def adam_step(
    learning_rate: float,
    values: Float[Array, "t"],
    gradient: Float[Array, "t"],
    moments: Any,
    labeled: Bool[Array, "t"],
) -> tuple[Float[Array, "t"], Any]:
    """The values of labeled tasks after a step of Adam, and its moments."""
    updates, moments = optax.adam(learning_rate).update(gradient, moments)
    return values + jnp.where(labeled, jnp.asarray(updates), 0.0), moments


WEIGHTINGS: dict[str, type[Weighting]] = {
    "fixed": Weighting,
    "uncertainty": Uncertainty,
    "gradnorm": GradNorm,
    "dynamic_average": DynamicAverage,
}


def new_weighting(name: str, params: Mapping[str, float] | None) -> Weighting:
    """A weighting by its name.

    Args:
        params: its settings.

    Raises:
        ValueError: it has no such setting, or a value is no number above 0.
    """
    kind = WEIGHTINGS[name]
    known = [field.name for field in fields(kind)]
    for key, value in (params or {}).items():
        if key not in known:
            raise ValueError(f"weighting_params: {name!r} has no setting {key!r}, only {known}")
        if not (isinstance(value, Real) and 0 < value < float("inf")):
            raise ValueError(f"weighting_params: {key}={value!r}: use a positive number")
    return kind(**(params or {}))
