"""Each token chooses its k experts, and each expert has a limited number of slots: V-MoE's router.

All first choices get their slots before any second choice; within one rank the priority decides.
A choice without a free slot is dropped, unless it may move to the next expert (``overflow.py``). A
token whose choices are all dropped skips the layer: only its residual connection remains.

Source: "Scaling Vision with Sparse Mixture of Experts", sections 2 and 4 (arXiv 2106.05974).
"""

import dataclasses
from typing import Annotated, Literal

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from vmoe.axes import Decision, RouterInputs, Routing
from vmoe.fields import NonNegative, Positive, at_least
from vmoe.routing.aux_losses import AuxLossWeights
from vmoe.routing.overflow import Overflow, to_next_experts
from vmoe.routing.priority import Priority, priority_order
from vmoe.routing.queues import queue
from vmoe.routing.router import Router
from vmoe.routing.top_k import gates_of, top_k


@dataclasses.dataclass(frozen=True)
class TokenChoice(Router):
    """Each token chooses its k experts: the router of V-MoE (arXiv 2106.05974).

    FastMoE's naive gate (arXiv 2103.13262) is this router with ``normalize_weights``, without noise
    and without losses, in a dropless layer.
    """

    kind: Literal["token_choice"] = "token_choice"
    """The router."""
    k: Annotated[int, at_least(1)] = 2
    """Experts per token."""
    priority: Priority = "order"
    """Order in which tokens get slots. order: by position in the group; largest_gate: by the
    largest gate (Batch Prioritized Routing); sum_of_gates: by the sum of the k gates; random: in
    random order, a baseline."""
    noise_std: NonNegative = 1.0
    """Noise on the logits in training: its standard deviation is noise_std / e, for e experts,
    unless the gate determines it."""
    normalize_weights: bool = False
    """Divide a token's combine weights by their sum, before any choice is dropped. With k = 1 every
    weight is then 1; the sum counts as a constant in the gradient, so that the gate is trained."""
    overflow: Overflow = "drop"
    """What becomes of choices without a free slot. drop: nothing, they are dropped; next_expert:
    they move to the next-ranked experts of their tokens that have room."""
    shares: tuple[Positive, ...] = ()
    """The relative load that each expert is to have, in the losses that balance it and in its
    capacity: k * s * capacity_factor * its share / the sum of all, rounded. () for equal ones.
    MoE++ (arXiv 2410.07348) gives zero, identity and constant experts 1, all others its tau."""
    aux_loss: AuxLossWeights = AuxLossWeights()

    @property
    def normalized(self) -> bool:
        return self.normalize_weights

    def __call__(self, inputs: RouterInputs, c: int) -> Decision:
        noisy = inputs.noisy_logits
        gates = gates_of(noisy)
        routing = assign(
            gates,
            inputs.valid,
            k=self.k,
            c=c,
            priority=self.priority,
            normalize=self.normalize_weights,
            draw=inputs.draw,
            overflow=self.overflow,
            limits=self.limits(c, inputs.valid.shape[1]),
        )
        return self.decision(inputs, noisy, gates, routing)

    def slots(self, s: int, e: int) -> int:
        """As for any router; with ``shares`` the slots of the expert with the largest one."""
        return max(self._by_share(s), default=super().slots(s, e))

    def _by_share(self, s: int) -> list[int]:
        """Slots of each expert in a group of s tokens; empty if all have the same.

        MoE++, equation 8, times k: as without shares, the capacity factor is per choice.
        """
        if self.dropless:
            return []
        ideal = s * self.k * self.capacity_factor / sum(self.shares or [1])
        return [min(s, self.rounded(ideal * share, len(self.shares))) for share in self.shares]

    def limits(self, c: int, s: int) -> Int[Array, "e"] | None:
        """Slots of each expert, if they differ; at most c."""
        return jnp.minimum(c, jnp.array(slots)) if (slots := self._by_share(s)) else None


def assign(
    gates: Float[Array, "g s e"],
    valid: Bool[Array, "g s"],
    *,
    k: int,
    c: int,
    priority: str = "order",
    normalize: bool = False,
    draw: Float[Array, "g s"] | None = None,
    overflow: Overflow = "drop",
    limits: Int[Array, "e"] | None = None,
) -> Routing:
    """Assigns tokens to experts and slots, for given gates.

    Args:
        gates: in [0, 1].
        valid: False for padding, which never takes a slot.
        priority: see ``priority_order``.
        normalize: divide a token's weights by their sum, before any is dropped. If k is 1, the sum
            is a constant for the gradient: the gate is trained, although the weight is 1.
        draw: for a random priority; see ``priority_order``.
        overflow: what becomes of choices without a free slot.
        limits: slots of each expert, at most c; c if None.
    """
    top_gates, experts = top_k(gates, k)  # g s k
    routing = assign_chosen(
        top_gates,
        experts,
        valid,
        e=gates.shape[-1],
        c=c,
        priority=priority,
        normalize=normalize,
        draw=draw,
    )
    _, s, e = gates.shape
    if limits is not None:
        routing = first_slots(routing, limits)
    if overflow == "drop" or k == e or (c >= s and limits is None):  # no choice can move
        return routing
    order = priority_order(top_gates, priority, draw)
    experts, slots, choices = to_next_experts(routing, gates, valid, order, limits)
    weights = jnp.take_along_axis(gates, jnp.minimum(experts, e - 1), axis=-1)
    weights = normalized(weights) if normalize else weights
    return Routing(experts, slots, choices, jnp.where(slots < e * c, weights, 0.0))


def assign_chosen(
    top_gates: Float[Array, "g s k"],
    experts: Int[Array, "g s k"],
    valid: Bool[Array, "g s"],
    *,
    e: int,
    c: int,
    priority: str = "order",
    normalize: bool = False,
    draw: Float[Array, "g s"] | None = None,
    ranks: Int[Array, ""] | None = None,
    weights: Float[Array, "g s k"] | None = None,
) -> Routing:
    """Assigns choices to slots, for given choices of each token: ``assign`` without the choice.

    Args:
        top_gates: the gate of each choice, for the priority; the first one counts as the largest.
        experts: the expert of each choice, all different for a token; e for none.
        ranks: use only the first ``ranks`` of a token's k choices; may be traced. All if None.
        weights: the combine weight of each choice; its gate if None.
    """
    experts = jnp.where(valid[..., None], experts, e)  # padding queues at no expert
    if ranks is not None:
        used = jnp.arange(experts.shape[-1]) < ranks
        top_gates, experts = jnp.where(used, top_gates, 0.0), jnp.where(used, experts, e)
        weights = None if weights is None else jnp.where(used, weights, 0.0)
    order = priority_order(top_gates, priority, draw)  # g s
    slots, choices = queue(experts, order, e=e, c=c)  # g s k, g e c
    weights = top_gates if weights is None else weights
    weights = normalized(weights) if normalize else weights
    return Routing(experts, slots, choices, jnp.where(slots < e * c, weights, 0.0))


def normalized(weights: Float[Array, "g s k"]) -> Float[Array, "g s k"]:
    """The weights divided by their sum, which is a constant for the gradient if k is 1."""
    total = weights.sum(-1, keepdims=True)
    return weights / (jax.lax.stop_gradient(total) if weights.shape[-1] == 1 else total)


def evenly_weighted(
    experts: Int[Array, "g s k"], valid: Bool[Array, "g s"], *, e: int, c: int
) -> Decision:
    """The decision of a router without a gate, for given choices: all weights are 1/k."""
    k = experts.shape[-1]
    routing = assign_chosen(jnp.full(experts.shape, 1 / k), experts, valid, e=e, c=c)
    return Decision(jax.nn.one_hot(experts, e).sum(-2) / k, routing)


def first_slots(routing: Routing, slots: Int[Array, ""] | Int[Array, "e"]) -> Routing:
    """Keeps the choices in the first slots of each expert, and drops all others.

    A choice's position in the queue of its expert does not depend on the number of slots, which
    may therefore be traced.
    """
    (_, e, c), (_, s, k) = routing.choices.shape, routing.slots.shape
    slots = jnp.broadcast_to(slots, e)
    kept = routing.kept & (routing.slots % c < slots[jnp.minimum(routing.experts, e - 1)])
    return Routing(
        routing.experts,
        slots=jnp.where(kept, routing.slots, e * c),
        choices=jnp.where(jnp.arange(c) < slots[:, None], routing.choices, s * k),
        weights=jnp.where(kept, routing.weights, 0.0),
    )
