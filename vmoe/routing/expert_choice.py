"""Each expert chooses the tokens with its largest gates, one for each of its slots.

Every slot is filled if there are enough tokens, so no auxiliary loss is needed. A token may get
several experts or none.

Source: "Mixture-of-Experts with Expert Choice Routing", section 3.2 (arXiv 2202.09368).
"""

import dataclasses
import functools
from typing import Literal

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from vmoe.axes import Decision, RouterInputs, Routing
from vmoe.fields import NonNegative
from vmoe.routing.capacity import Capacity
from vmoe.routing.one_hot import one_hot_routing
from vmoe.routing.router import AnyRouter
from vmoe.routing.top_k import gates_of, mask_gates, top_k


@dataclasses.dataclass(frozen=True)
class ExpertChoice(Capacity, AnyRouter):
    """Each expert chooses the tokens with its largest gates (Expert Choice, arXiv 2202.09368)."""

    kind: Literal["expert_choice"] = "expert_choice"
    """The router."""
    noise_std: NonNegative = 1.0
    """The noise on the logits in training has standard deviation noise_std / e, unless the gate
    determines it."""

    def slots(self, s: int, e: int) -> int:
        """s * capacity_factor / e, rounded; at most s."""
        return min(s, self.rounded(s * self.capacity_factor / e, e))

    def __call__(self, inputs: RouterInputs, c: int) -> Decision:
        gates = gates_of(inputs.noisy_logits)
        return Decision(gates, assign(gates, inputs.valid, c=c))

    def without_scatters(self, inputs: RouterInputs, c: int) -> Decision:
        gates = gates_of(inputs.logits)
        _, tokens = top_k(jnp.swapaxes(gates, 1, 2), c)  # g e c
        filled = tokens[:, None] == jnp.arange(gates.shape[1])[:, None, None]
        return Decision(gates, one_hot_routing(filled, gates))


def assign(gates: Float[Array, "g s e"], valid: Bool[Array, "g s"], *, c: int) -> Routing:
    """Assigns tokens to experts and slots, for given gates.

    In the Routing, k is e and rank r is expert r.

    Args:
        gates: in [0, 1].
        valid: False for padding, which is never chosen.
    """
    g, s, e = gates.shape
    top_gates, tokens = top_k(jnp.swapaxes(mask_gates(gates, valid), 1, 2), c)
    choices = jnp.where(top_gates >= 0, tokens * e + jnp.arange(e)[:, None], s * e)
    slots = jax.vmap(functools.partial(_invert, size=s * e))(choices).reshape(g, s, e)
    chosen = slots < e * c
    experts = jnp.where(chosen, jnp.arange(e), e)
    return Routing(experts, slots, choices, jnp.where(chosen, gates, 0.0))


def _invert(choices: Int[Array, "e c"], *, size: int) -> Int[Array, "size"]:
    """The slot of each choice, from the choice in each slot; e * c for choices without a slot."""
    slots = jnp.full(size, choices.size, jnp.int32)
    return slots.at[choices.reshape(-1)].set(jnp.arange(choices.size, dtype=jnp.int32), mode="drop")
