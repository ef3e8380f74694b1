"""Chains of events, each of which needs the one before: a click, then a purchase.

Tasks are in the order of the chain, and each has one output, the logit of its event.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float

from vmoe.errors import UsageError
from vmoe.multitask.bodies import Body, BodyOutput, ExpertsLike, as_experts
from vmoe.multitask.model import MultiTask


class TaskNetworks(Body):
    """A network for each task. The tasks share the inputs alone, such as embeddings."""

    def __init__(self, networks: ExpertsLike):
        """
        Args:
            networks: one for each task.
        """
        self.networks = as_experts(networks)

    def __call__(self, rows: Float[Array, "b d"]) -> BodyOutput:
        return BodyOutput(self.networks.on_same(rows), None, jnp.zeros(()))


class AdaptiveTransfer(Body):
    """A network for each task, whose features are mixed with those of the event before.

    Adaptive information transfer (Xi et al. 2021, section 3.3, with the paper's letters): q_t is
    the output of a task's network, and z_1 = q_1. Task t > 1 attends to q_t and to what the event
    before transfers, p = g_t(z_{t-1}):

        z_t = sum_u w_u h1(u),  u in {p, q_t},  w = softmax_u(<h2(u), h3(u)> / sqrt(k)),

    where k is the number of features. As in the authors' code, h1, h2 and h3 are one for all tasks.

    Parameters: ``networks``, ``transfers`` (g), ``value`` (h1), ``query`` (h2), ``key`` (h3).
    """

    def __init__(
        self,
        networks: ExpertsLike,
        transfers: Sequence[nnx.Module],
        *,
        value: nnx.Module,
        query: nnx.Module,
        key: nnx.Module,
    ):
        """
        Args:
            networks: one for each task.
            transfers: from features f[b f] to features, one for each task but the first.

        Raises:
            UsageError: their numbers do not fit.
        """
        self.networks = as_experts(networks)
        if len(transfers) != self.networks.num_experts - 1:
            raise UsageError(
                f"there are {self.networks.num_experts} networks and {len(transfers)} transfers: "
                "give one to each task but the first"
            )
        self.transfers = nnx.List(transfers)
        self.value, self.query, self.key = value, query, key

    def __call__(self, rows: Float[Array, "b d"]) -> BodyOutput:
        first, *others = self.networks.on_same(rows)
        features = [first]
        for own, transfer in zip(others, self.transfers, strict=True):
            both = jnp.stack([transfer(features[-1]), own])
            scores = (self.query(both) * self.key(both)).sum(-1) / jnp.sqrt(both.shape[-1])
            weights = jax.nn.softmax(scores, axis=0)
            features.append(jnp.einsum("ub,ubf->bf", weights, self.value(both)))
        return BodyOutput(jnp.stack(features), None, jnp.zeros(()))


class Esmm(MultiTask):
    """Probabilities of events as products along the chain: ESMM (Ma et al. 2018, arXiv 1804.07931).

    The first tower makes the logit of the first event, such as a click, any other that of its event
    given the one before, such as a purchase after a click. The outputs are the logits of the events
    among all rows, by p(click and purchase) = p(click) p(purchase | click) (eq. 1 and 2 of the
    paper). So the losses of all tasks are over all rows (eq. 3), and the tower of the purchase has
    none of its own.
    """

    def forward(self, inputs: Any) -> Any:
        """As ``MultiTask.forward``.

        Raises:
            UsageError: a task has more than one output.
        """
        outputs, weights, loss = super().forward(inputs)
        (first, before), *others = logits_of(outputs).items()
        made = {first: before}
        for name, given in others:
            made[name] = before = logit_of_product(before, given)
        return made, weights, loss


class Aitm(MultiTask):
    """Events whose probabilities shall fall along the chain (Xi et al. 2021, section 3.4).

    The behavioral expectation calibrator adds to the loss, as a mean over rows,

        weight * sum_{t > 1} max(p_t - p_{t-1}, 0).

    The body of the paper is ``AdaptiveTransfer``.
    """

    def __init__(
        self,
        body: Body,
        towers: Mapping[str, nnx.Module],
        inputs: nnx.Module | None = None,
        *,
        weight: float = 0.6,
    ):
        """
        Args:
            weight: of the calibrator; that of the authors' code is 0.6.
        """
        super().__init__(body, towers, inputs)
        self.weight = weight

    def forward(self, inputs: Any) -> Any:
        """As ``MultiTask.forward``.

        Raises:
            UsageError: a task has more than one output.
        """
        outputs, weights, loss = super().forward(inputs)
        p = jax.nn.sigmoid(jnp.stack(list(logits_of(outputs).values())))
        rises = jax.nn.relu(p[1:] - p[:-1]).sum(0).mean()
        return outputs, weights, loss + self.weight * rises


def logits_of(outputs: Mapping[str, Float[Array, "b q"]]) -> Mapping[str, Float[Array, "b 1"]]:
    """The outputs, of which each task has one."""
    for name, each in outputs.items():
        if each.shape[1] != 1:
            raise UsageError(
                f"task {name!r} has {each.shape[1]} outputs: a task of a chain has one, the logit "
                "of its event"
            )
    return outputs


def logit_of_product(a: Float[Array, "..."], b: Float[Array, "..."]) -> Float[Array, "..."]:
    """The logit of p q from the logits a of p and b of q, finite however large they are.

    With 1 - p q = (1 - p) + p (1 - q), it is log p + log q - log(1 - p q).
    """
    p, q = jax.nn.log_sigmoid(a), jax.nn.log_sigmoid(b)
    return p + q - jnp.logaddexp(jax.nn.log_sigmoid(-a), p + jax.nn.log_sigmoid(-b))
