"""Each expert chooses the tokens with its largest gates, one for each of its slots.

Every slot is filled if there are enough tokens, so no auxiliary loss is needed. A token may get
several experts or none. With a ``threshold_rate``, experts take in evaluation the tokens above a
threshold, so that the prediction for an image does not depend on the others. With groups as large
as the batch this is DiffMoE's capacity by batch.

Sources: "Mixture-of-Experts with Expert Choice Routing", section 3.2 (arXiv 2202.09368); "DiffMoE"
(arXiv 2503.14487), whose threshold is one of the scores of a learned predictor of the choice.
"""

import dataclasses
from typing import Annotated, Literal

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from vmoe.axes import Decision, RouterInputs, Routing
from vmoe.fields import NonNegative, at_least, at_most
from vmoe.routing.capacity import Capacity
from vmoe.routing.queues import invert
from vmoe.routing.router import AnyRouter, State
from vmoe.routing.thresholds import next_threshold, no_threshold, threshold_sums
from vmoe.routing.top_k import gates_of, top_k


@dataclasses.dataclass(frozen=True)
class ExpertChoice(Capacity, AnyRouter):
    """Each expert chooses the tokens with its largest gates (Expert Choice, arXiv 2202.09368)."""

    kind: Literal["expert_choice"] = "expert_choice"
    """The router."""
    noise_std: NonNegative = 1.0
    """The noise on the logits in training has standard deviation noise_std / e, unless the gate
    determines it."""
    threshold_rate: Annotated[float, at_least(0), at_most(1)] | None = None
    """In evaluation an expert takes the tokens whose gate is at least the mean of the smallest
    gates that it took in training, as far as it has slots; this is the weight of a step in that
    mean. None: experts choose as in training (arXiv 2503.14487)."""

    def slots(self, s: int, e: int) -> int:
        """s * capacity_factor / e, rounded; at most s."""
        return min(s, self.rounded(s * self.capacity_factor / e, e))

    def __call__(self, inputs: RouterInputs, c: int) -> Decision:
        noisy, valid, sums = inputs.noisy_logits, inputs.valid, None
        gates = gates_of(noisy)
        if inputs.state is not None and not inputs.training:
            valid = valid[..., None] & self.taken(inputs)
        routing = assign(gates, valid, c=c)
        if inputs.state is not None and inputs.training:
            smallest = jnp.where(routing.kept, jax.lax.stop_gradient(gates), jnp.inf).min(1)  # g e
            sums = threshold_sums(smallest, valid)
        return self.decision(inputs, noisy, gates, routing, sums=sums)

    def taken(self, inputs: RouterInputs) -> Bool[Array, "g s e"]:
        """Whether a gate reaches the threshold of its expert."""
        assert inputs.state is not None
        return gates_of(inputs.logits) >= inputs.state["threshold"][:, None]

    def initial_state(self, e: int) -> State:
        return {} if self.threshold_rate is None else no_threshold((e,))

    def next_state(self, state: State, sums: State) -> State:
        return next_threshold(state, sums, self.threshold_rate or 0.0) if state else state


def assign(gates: Float[Array, "g s e"], valid: Bool[Array, "g s *e"], *, c: int) -> Routing:
    """Assigns tokens to experts and slots, for given gates.

    In the Routing, k is e and rank r is expert r.

    Args:
        gates: in [0, 1].
        valid: False for padding, which is never chosen; with an axis e, for choices that are not
            allowed.
    """
    g, s, e = gates.shape
    allowed = valid if valid.ndim == 3 else valid[..., None]
    top_gates, tokens = top_k(jnp.swapaxes(jnp.where(allowed, gates, -1.0), 1, 2), c)
    choices = jnp.where(top_gates >= 0, tokens * e + jnp.arange(e)[:, None], s * e)
    slots = invert(choices.reshape(g, -1), s * e).reshape(g, s, e)
    chosen = slots < e * c
    experts = jnp.where(chosen, jnp.arange(e), e)
    return Routing(experts, slots, choices, jnp.where(chosen, gates, 0.0))
