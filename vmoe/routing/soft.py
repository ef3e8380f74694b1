"""Every slot is a weighted mean of all tokens, every token a weighted mean of all slots.

There are no choices and no drops, so there is no auxiliary loss and no noise.

Source: "From Sparse to Soft Mixtures of Experts", section 2 and algorithm 1 (arXiv 2308.00951).
"""

import dataclasses
from typing import Annotated, Literal

import jax
import jax.numpy as jnp

from vmoe.axes import Decision, RouterInputs, SoftRouting
from vmoe.fields import Positive, at_least
from vmoe.routing.router import AnyRouter


@dataclasses.dataclass(frozen=True)
class Soft(AnyRouter):
    """Each slot is a mixture of all tokens of an image (Soft MoE, arXiv 2308.00951).

    An expert has round(s * capacity_factor / e) slots, at least one.
    """

    kind: Literal["soft"] = "soft"
    """The router."""
    capacity_factor: Positive = 1.05
    """Slots of all experts for each token."""
    capacity: Annotated[int, at_least(1)] | None = None
    """Slots per expert; overrides the capacity factor."""

    logits_per = "slot"

    def slots(self, s: int, e: int) -> int:
        return self.capacity or max(1, round(s * self.capacity_factor / e))

    def __call__(self, inputs: RouterInputs, c: int) -> Decision:
        """Routes every group independently.

        Args:
            inputs: logits (g, s, e, c). Padding has weight 0 in every slot, unless a group has
                nothing else.
            c: unused; slots are parameters, so their number is the same for any image size.
        """
        logits, valid = inputs.logits, inputs.valid
        # In a group of only padding slots are mixtures, too: experts may not be finite at zero.
        mixed = valid | ~valid.any(axis=1, keepdims=True)
        dispatch = jax.nn.softmax(jnp.where(mixed[:, :, None, None], logits, -jnp.inf), axis=1)
        combine = jax.nn.softmax(logits, axis=(2, 3))
        return Decision(combine.sum(-1), SoftRouting(dispatch, combine))
