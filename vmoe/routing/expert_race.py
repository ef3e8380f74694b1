"""The k * s largest scores of all s tokens and e experts of a group win: Expert Race.

A token gets any number of experts, and an expert any number of tokens; k is the mean number of
experts of a token. An expert with more winners than slots takes the largest. The group is the
paper's batch if it has as many images. In evaluation, scores win that are as large as the mean of
the smallest winners in training (``thresholds.py``).

The paper's scores are the logits themselves. Its winners are those of a sigmoid, whose values are
weights in [0, 1]. Its loss on the similarity of experts is not here; the importance loss balances.

Source: "Expert Race", sections 4 and 5 (arXiv 2503.16057).
"""

import dataclasses
from typing import Annotated, Literal

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from vmoe.axes import Decision, RouterInputs
from vmoe.fields import at_least, at_most
from vmoe.routing.aux_losses import AuxLossWeights
from vmoe.routing.expert_choice import assign
from vmoe.routing.router import State
from vmoe.routing.target_k import TargetK
from vmoe.routing.thresholds import next_threshold, no_threshold, threshold_sums
from vmoe.routing.top_k import Scores, choosable, scores_and_gates, top_k


@dataclasses.dataclass(frozen=True)
class ExpertRace(TargetK):
    """The k * s largest scores of a group win (Expert Race, arXiv 2503.16057)."""

    kind: Literal["expert_race"] = "expert_race"
    """The router."""
    scores: Scores = "sigmoid"
    """The function from logits to scores, which are the combine weights."""
    threshold_rate: Annotated[float, at_least(0), at_most(1)] = 0.05
    """Weight of a step of training in the mean that is the threshold in evaluation."""
    aux_loss: AuxLossWeights = AuxLossWeights(load=0.0)

    def __call__(self, inputs: RouterInputs, c: int) -> Decision:
        """The decision's gates are the scores divided by their sum over the experts."""
        assert inputs.state is not None
        logits = inputs.noisy_logits
        scores, gates = scores_and_gates(logits, self.scores)
        allowed = choosable(inputs)
        if inputs.training:
            won, smallest = race(scores, allowed, inputs.valid, k=self.k)
            sums = threshold_sums(smallest, inputs.valid)
        else:
            won = allowed & (scores >= inputs.state["threshold"][:, None, None])
            sums = {}
        routing = assign(scores, won, c=c)
        e = logits.shape[-1]
        wanted = jnp.where(won, jnp.arange(e), e)  # also the winners without a slot
        return self.decision(inputs, logits, gates, routing._replace(experts=wanted), sums=sums)

    def initial_state(self, e: int) -> State:
        return no_threshold(())

    def next_state(self, state: State, sums: State) -> State:
        return next_threshold(state, sums, self.threshold_rate)


def race(
    scores: Float[Array, "g s e"],
    allowed: Bool[Array, "g s e"],
    valid: Bool[Array, "g s"],
    *,
    k: int,
) -> tuple[Bool[Array, "g s e"], Float[Array, "g"]]:
    """The winners of each group, k for each token that is not padding, and the smallest of them."""
    g, s, e = scores.shape
    flat = jnp.where(allowed, jax.lax.stop_gradient(scores), -1).reshape(g, -1)
    largest, index = top_k(flat, k * s)
    winners = (jnp.arange(k * s) < k * valid.sum(1, keepdims=True)) & (largest >= 0)
    index = jnp.where(winners, index, s * e)
    won = jax.vmap(lambda i: jnp.zeros(s * e, bool).at[i].set(True, mode="drop"))(index)
    return won.reshape(g, s, e), jnp.where(winners, largest, jnp.inf).min(1)
