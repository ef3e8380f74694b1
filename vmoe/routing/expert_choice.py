"""Each expert chooses the tokens with its largest gates, one for each of its slots.

Every slot is filled if there are enough tokens, so no auxiliary loss is needed. A token may get
several experts or none.

Source: "Mixture-of-Experts with Expert Choice Routing", section 3.2 (arXiv 2202.09368).
"""

import functools

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from vmoe.axes import Decision, RouterInputs, Routing
from vmoe.config import MoEConfig
from vmoe.routing.capacity import rounded_capacity
from vmoe.routing.one_hot import one_hot_routing
from vmoe.routing.top_k import gates_of, mask_gates, top_k


def capacity(config: MoEConfig, s: int) -> int:
    """Slots per expert in a group of s tokens: s * capacity_factor / e, rounded; at most s."""
    return min(s, rounded_capacity(s * config.capacity_factor / config.num_experts, config))


def route(inputs: RouterInputs, config: MoEConfig, capacity: int) -> Decision:
    """Routes every group independently.

    Args:
        inputs: logits (g, s, e); the noise is added before the softmax.
    """
    gates = gates_of(inputs.noisy_logits)
    return Decision(gates, assign(gates, inputs.valid, c=capacity), {})


def route_without_scatters(inputs: RouterInputs, config: MoEConfig, capacity: int) -> Decision:
    """As ``route`` in evaluation, for groups without padding; see ``one_hot.py``."""
    gates = gates_of(inputs.logits)
    _, tokens = top_k(jnp.swapaxes(gates, 1, 2), capacity)  # g e c
    filled = tokens[:, None] == jnp.arange(gates.shape[1])[:, None, None]
    return Decision(gates, one_hot_routing(filled, gates), {})


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
    return slots.at[choices.reshape(-1)].set(jnp.arange(choices.size), mode="drop")
