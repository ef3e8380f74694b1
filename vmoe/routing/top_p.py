"""Each token uses its likeliest experts up to a probability, which a controller sets: DTop-p.

A token's experts are the fewest with the largest gates whose sum reaches the threshold p; it has
at least one. The combine weights are the gates. A proportional-integral controller changes p after
each step of training, so that the mean number of experts per token comes to a target k. With E
experts,

    error = (k - choices / tokens) / E,    integral += integral_gain * error,
    p = integral + proportional_gain * error,

where both p and the integral stay in [0, 1]; the integral starts at ``threshold``. In evaluation p
is constant.

The paper has one threshold for all layers, and logits that each layer normalizes and scales for it.
Here each layer has a threshold of its own with the same target, so its logits stay as they are.

An expert has a fixed number of slots, made for k experts per token. All first choices get slots
before any second one; what finds no slot is dropped.

Source: "Sparsity-Controllable Dynamic Top-p MoE for Large Foundation Model Pre-training" (arXiv
2512.13996); top-p routing: "Harder Tasks Need More Experts" (arXiv 2403.07652).
"""

import dataclasses
from typing import Annotated, Literal

import jax.numpy as jnp

from vmoe.axes import Decision, RouterInputs
from vmoe.fields import NonNegative, at_most, more_than
from vmoe.routing.aux_losses import AuxLossWeights
from vmoe.routing.router import State
from vmoe.routing.target_k import TargetK
from vmoe.routing.token_choice import assign_chosen
from vmoe.routing.top_k import gates_of, top_k


@dataclasses.dataclass(frozen=True)
class TopP(TargetK):
    """Each token uses its likeliest experts up to a probability (DTop-p, arXiv 2512.13996)."""

    kind: Literal["top_p"] = "top_p"
    """The router."""
    threshold: Annotated[float, more_than(0), at_most(1)] = 0.5
    """The sum of gates that a token's experts reach, at the start."""
    proportional_gain: NonNegative = 0.1
    """Change of the threshold by the present error, in experts per token and expert."""
    integral_gain: NonNegative = 0.05
    """Change of the threshold by the sum of all errors."""
    aux_loss: AuxLossWeights = AuxLossWeights(importance=0.0, load=0.0, gshard=0.01)

    def __call__(self, inputs: RouterInputs, c: int) -> Decision:
        assert inputs.state is not None
        noisy = inputs.noisy_logits
        gates = gates_of(noisy)
        e = gates.shape[-1]
        largest, experts = top_k(gates, e)  # g s e
        before = largest.cumsum(-1) - largest
        used = (before < inputs.state["threshold"][:, None, None]) & (largest > 0)
        experts = jnp.where(used.at[..., 0].set(True), experts, e)
        routing = assign_chosen(largest, experts, inputs.valid, e=e, c=c)
        return self.decision(inputs, noisy, gates, routing)

    def initial_state(self, e: int) -> State:
        start = jnp.full((), self.threshold)
        return {"threshold": start, "integral": start}

    def next_state(self, state: State, sums: State) -> State:
        integral, choices = state["integral"], sums["choices"]
        error = (self.target_k - choices.sum() / sums["tokens"]) / len(choices)
        error = error.astype(integral.dtype)
        integral = jnp.clip(integral + self.integral_gain * error, 0, 1)
        threshold = jnp.clip(integral + self.proportional_gain * error, 0, 1)
        return {"threshold": threshold, "integral": integral}
