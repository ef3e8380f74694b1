"""Each token chooses its k experts, whose load is balanced by a bias and not by a loss.

An expert's bias is added to its scores for the choice alone; the combine weights are the scores.
After each step of training the bias rises by ``update_rate`` if the expert had fewer choices than
the mean, and falls if it had more. The paper's main experiments use a sigmoid, whose scores are not
normalized (equation 3 and section 4.1). So this router differs from token choice in more than its
balance: by default it has sigmoid scores and no noise.

Source: "Auxiliary-Loss-Free Load Balancing Strategy for Mixture-of-Experts", section 3 and
algorithm 1 (arXiv 2408.15664).
"""

import dataclasses
from typing import Annotated, Literal

import jax.numpy as jnp

from vmoe.axes import Decision, RouterInputs
from vmoe.fields import NonNegative, at_least
from vmoe.routing.priority import Priority
from vmoe.routing.router import Router, State
from vmoe.routing.token_choice import assign_chosen
from vmoe.routing.top_k import MASKED, Scores, scores_and_gates, top_k

SMALLEST = 1e-20  # of the weights


@dataclasses.dataclass(frozen=True)
class BiasBalanced(Router):
    """Each token chooses its k experts; a bias balances their load (arXiv 2408.15664)."""

    kind: Literal["bias_balanced"] = "bias_balanced"
    """The router."""
    k: Annotated[int, at_least(1)] = 2
    """Experts per token."""
    scores: Scores = "sigmoid"
    """The function from logits to scores."""
    update_rate: NonNegative = 0.001
    """Change of an expert's bias after each step of training."""
    priority: Priority = "order"
    """Order in which tokens get slots; see ``TokenChoice``. largest_gate: by the gate of the expert
    that is chosen first, with its bias."""
    normalize_weights: bool = False
    """Divide a token's combine weights by their sum, before any choice is dropped, as DeepSeek-V3
    does (arXiv 2412.19437); with k = 1 as in ``TokenChoice``."""

    @property
    def normalized(self) -> bool:
        return self.normalize_weights

    def __call__(self, inputs: RouterInputs, c: int) -> Decision:
        """The decision's gates are the scores divided by their sum over the experts."""
        assert inputs.state is not None
        logits = inputs.noisy_logits
        scores, gates = scores_and_gates(logits, self.scores)
        masked = inputs.logits <= MASKED  # no bias lifts such an expert
        biased = jnp.where(masked, -jnp.inf, scores + inputs.state["bias"][:, None])
        _, experts = top_k(biased, self.k)
        # A bias can choose experts whose scores round to 0, which could not be normalized.
        weights = jnp.where(masked, 0, jnp.maximum(scores, SMALLEST))
        routing = assign_chosen(
            jnp.take_along_axis(gates, experts, axis=-1),
            experts,
            inputs.valid,
            weights=jnp.take_along_axis(weights, experts, axis=-1),
            e=logits.shape[-1],
            c=c,
            priority=self.priority,
            normalize=self.normalize_weights,
            draw=inputs.draw,
        )
        return self.decision(inputs, logits, gates, routing)

    def initial_state(self, e: int) -> State:
        """No bias."""
        return {"bias": jnp.zeros(e)}

    def next_state(self, state: State, sums: State) -> State:
        choices = sums["choices"]
        return {"bias": state["bias"] + self.update_rate * jnp.sign(choices.mean() - choices)}
