"""Each token chooses its k experts; in training from scores that Sinkhorn's algorithm balances.

The choice in training is that of the largest k entries of the plan

    P = diag(u) exp(logits) diag(v),  rows sum to 1, columns to s / e,

over the s tokens of a group: the entropic optimal transport between tokens and experts. No gradient
passes through it. In evaluation it is that of the largest k logits, so that a token does not depend
on the others. The combine weights are, in both, the gates of the chosen experts: the softmax of the
logits, and for k = 1 their sigmoid, which unlike the one gate that is normalized has a gradient.

Megatron-LM, whose router this is (``sinkhorn_load_balancing``), iterates until v changes by less
than 1e-4; here the number of iterations is fixed, and the last step normalizes the rows, which
changes no choice. It has no auxiliary loss and no noise.

Source: "Unified Scaling Laws for Routed Language Models" (S-BASE, arXiv 2202.01169).
"""

import dataclasses
from typing import Annotated, Literal

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from vmoe.axes import Decision, RouterInputs
from vmoe.fields import Count, at_least
from vmoe.routing.router import Router
from vmoe.routing.token_choice import assign_chosen
from vmoe.routing.top_k import gates_of, top_k

SMALLEST = 1e-30  # of a column's sum


@dataclasses.dataclass(frozen=True)
class Sinkhorn(Router):
    """Each token chooses its k experts, in training by a balanced plan (S-BASE, arXiv
    2202.01169)."""

    kind: Literal["sinkhorn"] = "sinkhorn"
    """The router."""
    k: Annotated[int, at_least(1)] = 2
    """Experts per token."""
    iterations: Count = 20
    """Iterations of Sinkhorn's algorithm in training."""

    def __call__(self, inputs: RouterInputs, c: int) -> Decision:
        logits = scores = inputs.noisy_logits
        if inputs.training:
            scores = jax.lax.stop_gradient(logits)
            scores = plan(scores, inputs.valid, iterations=self.iterations)
        _, experts = top_k(scores, self.k)
        gates = gates_of(logits)
        weights = gates if self.k > 1 else jax.nn.sigmoid(logits)
        routing = assign_chosen(
            jnp.take_along_axis(gates, experts, axis=-1),
            experts,
            inputs.valid,
            weights=jnp.take_along_axis(weights, experts, axis=-1),
            e=logits.shape[-1],
            c=c,
        )
        return self.decision(inputs, logits, gates, routing)


def plan(
    logits: Float[Array, "g s e"], valid: Bool[Array, "g s"], *, iterations: int
) -> Float[Array, "g s e"]:
    """The plan of each group: the sum of a token's entries is 1, of an expert's nearly s / e.

    Args:
        valid: False for padding, which does not count in the sums over tokens.
    """

    def balanced(_: Int[Array, ""], log_v: Float[Array, "g 1 e"]) -> Float[Array, "g 1 e"]:
        rows = jnp.where(valid[..., None], gates_of(logits + log_v), 0)
        log_v = log_v - jnp.log(jnp.maximum(rows.sum(axis=1, keepdims=True), SMALLEST))
        return log_v - log_v.mean(axis=-1, keepdims=True)  # a common factor changes nothing

    return gates_of(
        logits + jax.lax.fori_loop(0, iterations, balanced, jnp.zeros_like(logits[:, :1]))
    )
