"""Each token chooses its k experts, and each expert has a limited number of slots: V-MoE's router.

All first choices get their slots before any second choice; within one rank the priority decides.
A choice without a free slot is dropped. A token whose choices are all dropped skips the layer: only
its residual connection remains.

Queueing takes one integer sort for any number of experts (a priority by score takes two more, over
the tokens). A choice's sort key is its expert, then its rank, then its token's index in the
priority order. So each expert's queue is contiguous in the sorted keys, and a choice's position in
the queue is its slot.

Source: "Scaling Vision with Sparse Mixture of Experts", sections 2 and 4 (arXiv 2106.05974).
"""

import dataclasses
import functools
from typing import Annotated, Literal

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from vmoe.axes import Decision, RouterInputs, Routing
from vmoe.errors import UsageError
from vmoe.fields import NonNegative, at_least
from vmoe.routing.aux_losses import AuxLossWeights
from vmoe.routing.one_hot import one_hot_queue, one_hot_routing
from vmoe.routing.priority import Priority, priority_order, priority_scores
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
        )
        return self.decision(inputs, noisy, gates, routing)

    def without_scatters(self, inputs: RouterInputs, c: int) -> Decision:
        weights = gates = gates_of(inputs.logits)
        top_gates, experts = top_k(gates, self.k)
        scores = priority_scores(top_gates, self.priority, None)
        if self.normalize_weights:
            weights = gates / top_gates.sum(axis=-1, keepdims=True)
        filled = one_hot_queue(experts, scores, e=gates.shape[-1], c=c)
        return Decision(gates, one_hot_routing(filled, weights))


def assign(
    gates: Float[Array, "g s e"],
    valid: Bool[Array, "g s"],
    *,
    k: int,
    c: int,
    priority: str = "order",
    normalize: bool = False,
    draw: Float[Array, "g s"] | None = None,
    ranks: Int[Array, ""] | None = None,
) -> Routing:
    """Assigns tokens to experts and slots, for given gates.

    Args:
        gates: in [0, 1].
        valid: False for padding, which never takes a slot.
        priority: see ``priority_order``.
        normalize: divide a token's weights by their sum, before any is dropped. If k is 1, the sum
            is a constant for the gradient: the gate is trained, although the weight is 1.
        draw: for a random priority; see ``priority_order``.
        ranks: use only the first ``ranks`` of a token's k choices; may be traced. All if None.
    """
    top_gates, experts = top_k(gates, k)  # g s k
    return assign_chosen(
        top_gates,
        experts,
        valid,
        e=gates.shape[-1],
        c=c,
        priority=priority,
        normalize=normalize,
        draw=draw,
        ranks=ranks,
    )


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
        weights: the combine weight of each choice; its gate if None.

    Raises:
        UsageError: a group has too many tokens and experts for 32-bit sort keys.
    """
    _, s, k = experts.shape
    if (e + 1) * s * k >= 2**31:
        raise UsageError(
            f"{s} tokens x {k} choices x {e} experts are too many for one group: "
            "lower moe.images_per_group, or the layer's group"
        )
    experts = jnp.where(valid[..., None], experts, e)  # padding queues at no expert
    if ranks is not None:
        used = jnp.arange(k) < ranks
        top_gates, experts = jnp.where(used, top_gates, 0.0), jnp.where(used, experts, e)
        weights = None if weights is None else jnp.where(used, weights, 0.0)
    order = priority_order(top_gates, priority, draw)  # g s
    slots, choices = queue(experts, order, e=e, c=c)  # g s k, g e c
    weights = top_gates if weights is None else weights
    if normalize:
        total = weights.sum(-1, keepdims=True)
        # With k = 1 every weight is 1, and no gradient would reach the gate through w / w.
        weights = weights / (jax.lax.stop_gradient(total) if k == 1 else total)
    return Routing(experts, slots, choices, jnp.where(slots < e * c, weights, 0.0))


def evenly_weighted(
    experts: Int[Array, "g s k"], valid: Bool[Array, "g s"], *, e: int, c: int
) -> Decision:
    """The decision of a router without a gate, for given choices: all weights are 1/k."""
    k = experts.shape[-1]
    routing = assign_chosen(jnp.full(experts.shape, 1 / k), experts, valid, e=e, c=c)
    return Decision(jax.nn.one_hot(experts, e).sum(-2) / k, routing)


def queue(
    experts: Int[Array, "g s k"], order: Int[Array, "g s"], *, e: int, c: int
) -> tuple[Int[Array, "g s k"], Int[Array, "g e c"]]:
    """Queues choices at their experts; returns ``slots`` and ``choices`` of the Routing.

    Args:
        experts: the expert of each choice; e for none.
        order: the tokens of each group, most important first.
    """
    return jax.vmap(functools.partial(_queue, e=e, c=c))(experts, order)


def _queue(
    experts: Int[Array, "s k"], order: Int[Array, "s"], *, e: int, c: int
) -> tuple[Int[Array, "s k"], Int[Array, "e c"]]:
    s, k = experts.shape
    place = jnp.zeros(s, jnp.int32)
    place = place.at[order].set(jnp.arange(s, dtype=jnp.int32), unique_indices=True)  # s
    ranks = jnp.arange(k, dtype=jnp.int32)
    turn = ranks * s + place[:, None]  # s k: all first choices come before any second one
    sort_keys = experts.astype(jnp.int32) * (s * k) + turn
    queue = jnp.sort(sort_keys.reshape(-1), stable=False)  # sk

    expert, turn = queue // (s * k), queue % (s * k)  # sk
    choice = order[turn % s] * k + turn // s  # sk: token * k + rank
    starts = jnp.searchsorted(queue, jnp.arange(e + 1) * (s * k))  # e + 1: of each expert's queue
    position = jnp.arange(s * k, dtype=jnp.int32) - starts[expert]  # sk: place in that queue
    slot = jnp.where((expert < e) & (position < c), expert * c + position, e * c)  # sk
    slots = jnp.zeros(s * k, jnp.int32).at[choice].set(slot, unique_indices=True).reshape(s, k)

    source = starts[:e, None] + jnp.arange(c)  # e c: index into the sorted choices
    choices = jnp.where(source < starts[1:, None], choice[jnp.minimum(source, s * k - 1)], s * k)
    return slots, choices


def first_slots(routing: Routing, slots: Int[Array, ""]) -> Routing:
    """Keeps the choices in the first slots of each expert, and drops all others.

    A choice's position in the queue of its expert does not depend on the number of slots, which
    may therefore be traced.
    """
    (_, e, c), (_, s, k) = routing.choices.shape, routing.slots.shape
    kept = routing.kept & (routing.slots % c < slots)
    return Routing(
        routing.experts,
        slots=jnp.where(kept, routing.slots, e * c),
        choices=jnp.where(jnp.arange(c) < slots, routing.choices, s * k),
        weights=jnp.where(kept, routing.weights, 0.0),
    )
