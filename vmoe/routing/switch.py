"""Each token chooses one expert, and its gate is the combine weight: Switch Transformer.

In training the gate sees jittered tokens (``MoE.route``). The loss "gshard" equals the paper's
loss (equation 4), including its scale: e times the sum over experts of first-choice share x mean
gate. Its weight of 0.01 is the paper's alpha.

Source: "Switch Transformers", sections 2.1 and 2.2, and appendix C for the jitter (arXiv
2101.03961).
"""

import dataclasses
from typing import Annotated, Literal

from vmoe.axes import Decision, RouterInputs
from vmoe.fields import at_least, less_than
from vmoe.routing.aux_losses import AuxLossWeights
from vmoe.routing.router import Router
from vmoe.routing.token_choice import assign
from vmoe.routing.top_k import gates_of


@dataclasses.dataclass(frozen=True)
class Switch(Router):
    """Each token chooses one expert (Switch Transformer, arXiv 2101.03961)."""

    kind: Literal["switch"] = "switch"
    """The router."""
    jitter: Annotated[float, at_least(0), less_than(1)] = 0.01
    """In training the gate's tokens are multiplied by random numbers in 1 +- jitter."""
    aux_loss: AuxLossWeights = AuxLossWeights(importance=0.0, load=0.0, gshard=0.01)

    def __call__(self, inputs: RouterInputs, c: int) -> Decision:
        noisy = inputs.noisy_logits
        gates = gates_of(noisy)
        routing = assign(gates, inputs.valid, k=1, c=c)
        return self.decision(inputs, noisy, gates, routing)
