"""Each token chooses one expert, and its gate is the combine weight: Switch Transformer.

In training the gate sees jittered tokens (``MoE.route``). The loss "gshard" equals the paper's
loss (equation 4), including its scale: e times the sum over experts of first-choice share x mean
gate. Its weight of 0.01 is the paper's alpha.

Source: "Switch Transformers", sections 2.1 and 2.2, and appendix C for the jitter (arXiv
2101.03961).
"""

from vmoe.axes import Decision, RouterInputs
from vmoe.config import MoEConfig
from vmoe.routing import aux_losses, token_choice
from vmoe.routing.top_k import gates_of

capacity = token_choice.capacity


def route(inputs: RouterInputs, config: MoEConfig, capacity: int) -> Decision:
    """Routes every group independently; tokens get slots by their order in the group."""
    noisy = inputs.noisy_logits
    gates = gates_of(noisy)
    routing = token_choice.assign(gates, inputs.valid, k=1, c=capacity)
    return Decision(gates, routing, aux_losses.losses(config.router, inputs, noisy, gates))
