"""Every slot is a weighted mean of all tokens, every token a weighted mean of all slots.

There are no choices and no drops, so there is no auxiliary loss and no noise.

Source: "From Sparse to Soft Mixtures of Experts", section 2 and algorithm 1 (arXiv 2308.00951).
"""

import dataclasses
from typing import Literal

import jax
import jax.numpy as jnp

from vmoe.axes import Decision, RouterInputs, SoftRouting
from vmoe.routing.capacity import Limits
from vmoe.routing.router import Router


@dataclasses.dataclass(frozen=True)
class Soft(Router):
    """Each slot is a mixture of all tokens of an image (Soft MoE, arXiv 2308.00951).

    An expert has round(s * capacity_factor / e) slots, at least one; ``capacity_multiple`` does not
    apply.
    """

    kind: Literal["soft"] = "soft"
    """The router."""

    logits_per = "slot"
    can_drop = False

    def capacity(self, limits: Limits, s: int) -> int:
        if limits.capacity is not None:
            return limits.capacity
        return max(1, round(s * limits.capacity_factor / limits.num_experts))

    def __call__(self, inputs: RouterInputs, c: int) -> Decision:
        """Routes every group independently.

        Args:
            inputs: logits (g, s, e, c). Padding has weight 0 in every slot.
            c: unused; slots are parameters, so their number is the same for any image size.
        """
        logits, valid = inputs.logits, inputs.valid[:, :, None, None]
        masked = jnp.where(valid, logits, -jnp.inf)
        # In a group of only padding all logits are -inf, whose softmax is NaN.
        dispatch = jnp.where(valid, jax.nn.softmax(masked, axis=1), 0.0)
        combine = jax.nn.softmax(logits, axis=(2, 3))
        return Decision(combine.sum(-1), SoftRouting(dispatch, combine))

    without_scatters = __call__
