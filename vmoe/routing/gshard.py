"""Each token chooses two experts, and uses the second one at random: GShard's router.

The two gates are divided by their sum. In training the second choice is made with probability
min(1, 2 x its weight), since a small weight does not need a slot; the weight of the first choice
stays as it is. In evaluation every token uses both, so that predictions are not random. The paper
names no rule for evaluation; this is the policy "all" of ``second_policy_eval`` in Mesh
TensorFlow, whose default is random there too.

The loss is e^2 times the paper's mean over experts of first-choice share x mean gate, the scale
of Mesh TensorFlow, whose weight is 0.01 (``moe_loss_coef``).

Source: "GShard", section 2.2 and algorithm 1 (arXiv 2006.16668).
"""

import dataclasses
from typing import Literal

import jax.numpy as jnp

from vmoe.axes import Decision, RouterInputs
from vmoe.routing.aux_losses import AuxLossWeights
from vmoe.routing.router import Router
from vmoe.routing.token_choice import assign_chosen
from vmoe.routing.top_k import gates_of, top_k


@dataclasses.dataclass(frozen=True)
class GShard(Router):
    """Each token chooses two experts, the second one at random (GShard, arXiv 2006.16668)."""

    kind: Literal["gshard"] = "gshard"
    """The router."""
    aux_loss: AuxLossWeights = AuxLossWeights(importance=0.0, load=0.0, gshard=0.01)

    k = 2
    normalized = True

    def __call__(self, inputs: RouterInputs, c: int) -> Decision:
        noisy = inputs.noisy_logits
        gates = gates_of(noisy)
        e = gates.shape[-1]
        top_gates, experts = top_k(gates, 2)  # g s 2
        weights = top_gates / top_gates.sum(-1, keepdims=True)
        if inputs.draw is not None:
            second = inputs.draw < 2 * weights[..., 1]  # g s
            experts = experts.at[..., 1].set(jnp.where(second, experts[..., 1], e))
        routing = assign_chosen(weights, experts, inputs.valid, e=e, c=c)
        return self.decision(inputs, noisy, gates, routing)
