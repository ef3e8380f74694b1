"""Shared experts, which every token uses besides the routed ones."""

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float

from vmoe.errors import UsageError, require
from vmoe.nn.experts.copies import Copies, check_expert, shared_variables
from vmoe.nn.experts.interface import Experts, Slots
from vmoe.nn.inputs import taking
from vmoe.nn.keys import MaybeKey


def on_tokens_alone(shared: Any, beside: Sequence[nnx.Module]) -> Experts:
    """The shared experts, after checking that they need no slots.

    Args:
        beside: the experts of the layer first, and other modules whose variables stay one.
    """
    if not isinstance(shared, Experts):
        check_expert("the shared expert", shared)
        ids = shared_variables([shared, *beside])
        shared = Copies([shared], shared=ids, numbers=[beside[0].num_experts])
    if asks := shared.asks | (shared.takes - {"key"}):
        asked = ", ".join(sorted(asks))
        raise UsageError(f"the shared expert has no slots: it cannot ask for {asked}")
    return shared


def shared_outputs(
    shared: Experts, gate: nnx.Module | None, tokens: Float[Array, "b n d"], key: MaybeKey, x: int
) -> Float[Array, "b n x"]:
    """The sum of the outputs of all shared experts, times the sigmoid of their gate.

    Args:
        gate: None for no gate.
        x: width of the outputs of the routed experts.
    """
    (b, n, d), e = tokens.shape, shared.num_experts
    slots = jnp.broadcast_to(tokens[:, None], (b, e, n, d))
    by_expert = shared(slots, Slots(n, n, {}), key)  # b e n x
    width = by_expert.shape[-1]
    require(
        width == x,
        f"the shared expert has outputs of width {width}, the others of {x}: make them equal",
    )
    total = by_expert.sum(1) if e > 1 else by_expert[:, 0]
    if gate is not None:
        with taking("the gate of the shared experts", tokens.shape):
            total = total * jax.nn.sigmoid(gate(tokens))
    return total
