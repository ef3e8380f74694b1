"""Tokens or experts choose by a sparse plan that balances the experts: sparse optimal transport.

The plan T (s, e) of a group has few entries above 0. With k experts per token it is the solution of

    max_T  sum(T * gates) - |T|^2 / 2,
    each row at least 0, with sum 1 and at most k entries above 0; each column with sum s / e,

and if experts choose, the same with rows and columns exchanged: columns with sum s / e and at most
c entries, rows with sum 1. With duals of the second sums (the semi-dual) each line has a
closed form: its largest entries, plus the duals, projected onto the simplex. The gradient of the
semi-dual is the error of the second sums. From duals of 0 there are ``steps`` steps of Adam, or
fewer if the gradient's norm falls to 1e-3. So the first sums are exact, the second approximate.
These are the numerics of the authors' code (``projects/sparsity_constrained_ot`` of V-MoE).

The combine weights are the gates: the plan only chooses. No gradient passes through the duals. An
entry of the plan depends on all tokens of the group, in evaluation too.

Source: "Sparsity-Constrained Optimal Transport" (arXiv 2209.15466).
"""

import dataclasses
import functools
from typing import Annotated, Any, Literal, cast

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Bool, Float, Int

from vmoe.axes import Decision, RouterInputs
from vmoe.fields import Count, Positive, at_least
from vmoe.routing import expert_choice
from vmoe.routing.capacity import Capacity
from vmoe.routing.priority import Priority
from vmoe.routing.router import AnyRouter, Router
from vmoe.routing.token_choice import assign_chosen
from vmoe.routing.top_k import MASKED, choosable, gates_of, top_k

TOLERANCE = 1e-3  # of the norm of the semi-dual's gradient


@dataclasses.dataclass(frozen=True)
class Transport(Router):
    """Each token chooses at most k experts by a balanced sparse plan (arXiv 2209.15466)."""

    kind: Literal["transport"] = "transport"
    """The router."""
    k: Annotated[int, at_least(1)] = 2
    """Most experts per token."""
    priority: Priority = "order"
    """Order in which tokens get slots; see ``TokenChoice``. Gates are the entries of the plan."""
    weights: Literal["gates", "plan"] = "gates"
    """What the combine weights are. The plan's have a gradient only if k is more than 1."""
    steps: Count = 20
    """Steps of Adam that balance the experts."""
    rate: Positive = 0.01
    """Learning rate of Adam."""

    @property
    def normalized(self) -> bool:
        return self.weights == "plan"

    def __call__(self, inputs: RouterInputs, c: int) -> Decision:
        gates = gates_of(inputs.noisy_logits)
        e, allowed = gates.shape[-1], choosable(inputs)
        tokens = inputs.valid.sum(1, dtype=gates.dtype)[:, None]  # g 1
        balance = functools.partial(plan, k=self.k, steps=self.steps, rate=self.rate)
        entries = balance(gates, allowed, jnp.ones_like(tokens), tokens / e)
        top, experts = top_k(entries, self.k)
        weights = jnp.take_along_axis(gates, experts, axis=-1) if self.weights == "gates" else top
        routing = assign_chosen(
            top,
            jnp.where(top > 0, experts, e),
            inputs.valid,
            weights=weights,
            e=e,
            c=c,
            priority=self.priority,
            draw=inputs.draw,
        )
        return self.decision(inputs, inputs.noisy_logits, gates, routing)


@dataclasses.dataclass(frozen=True)
class TransportExpertChoice(Capacity, AnyRouter):
    """Each expert chooses its tokens by a balanced sparse plan (arXiv 2209.15466)."""

    kind: Literal["transport_expert_choice"] = "transport_expert_choice"
    """The router."""
    steps: Count = 20
    """Steps of Adam that balance the tokens."""
    rate: Positive = 0.01
    """Learning rate of Adam."""

    slots = expert_choice.ExpertChoice.slots

    def __call__(self, inputs: RouterInputs, c: int) -> Decision:
        gates = gates_of(inputs.noisy_logits)
        real = inputs.valid.astype(gates.dtype)  # g s
        tokens = jnp.maximum(real.sum(1, keepdims=True), 1)
        by_expert, allowed = jnp.swapaxes(gates, 1, 2), jnp.swapaxes(choosable(inputs), 1, 2)
        balance = functools.partial(plan, k=c, steps=self.steps, rate=self.rate)
        entries = balance(by_expert, allowed, tokens / gates.shape[-1], real)
        entries = jnp.swapaxes(entries, 1, 2)
        routing = expert_choice.assign(entries, entries > 0, c=c)
        routing = routing._replace(weights=jnp.where(routing.kept, gates, 0))
        return self.decision(inputs, inputs.noisy_logits, gates, routing)


def plan(
    values: Float[Array, "g y x"],
    allowed: Bool[Array, "g y x"],
    sums: Float[Array, "g 1"],
    others: Float[Array, "g #x"],
    *,
    k: int,
    steps: int,
    rate: float,
) -> Float[Array, "g y x"]:
    """The sparse plan of each group, whose lines along the last axis are exact.

    Args:
        values: what an entry of 1 is worth.
        allowed: where an entry may be more than 0.
        sums: the sum of each line along the last axis, and
        others: of each line along the axis y.
        k: most entries above 0 of a line along the last axis.
        steps: steps of Adam for the sums along y.
        rate: its learning rate.
    """
    optimizer, scale = optax.adam(rate), sums[..., None]

    def entries(duals: Float[Array, "g x"]) -> Float[Array, "g y x"]:
        reachable = jnp.where(allowed, values + duals[:, None], MASKED) / scale
        return jnp.where(allowed, scale * sparse_simplex(reachable, k), 0)

    def step(_: Int[Array, ""], carry: tuple[Any, Any, Any]) -> tuple[Any, Any, Any]:
        duals, state, running = carry
        error = entries(duals).sum(1) - others
        change, state = optimizer.update(error, state)
        duals = jnp.where(running, cast(Array, optax.apply_updates(duals, change)), duals)
        return duals, state, running & (jnp.linalg.norm(error, axis=1, keepdims=True) > TOLERANCE)

    duals, running = jnp.zeros_like(values[:, 0]), jnp.ones(sums.shape, bool)
    start = duals, optimizer.init(duals), running
    return entries(jax.lax.stop_gradient(jax.lax.fori_loop(0, steps, step, start)[0]))


def sparse_simplex(values: Float[Array, "*g x"], k: int) -> Float[Array, "*g x"]:
    """The nearest point with sum 1, entries of at least 0, and at most k of them above 0."""
    k = min(k, values.shape[-1])
    top, index = top_k(values, k)
    sums, count = top.cumsum(-1), jnp.arange(1, k + 1)
    support = jnp.maximum((1 + count * top > sums).sum(-1, keepdims=True), 1)
    excess = (jnp.take_along_axis(sums, support - 1, axis=-1) - 1) / support
    entries = jax.nn.relu(top - excess)
    return jnp.put_along_axis(jnp.zeros_like(values), index, entries, axis=-1, inplace=False)
