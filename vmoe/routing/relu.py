"""Each token uses every expert whose logit is above 0, with the logit as the weight: ReMoE.

The weights are relu(logits), without normalization, so the choice is differentiable. An L1 loss
with an adaptive coefficient keeps the mean number of experts per token at a target k. The loss of a
group of T tokens and E experts is

    l1 = coefficient * mean over tokens of sum over experts of f_e * relu(logit_e),
    f_e = E / (k T) * number of tokens whose logit for expert e is above 0,

which also balances the load; no gradient passes through f. After each step of training the
coefficient is multiplied by ``factor`` if the tokens had more than k experts in the mean, and
divided by it if they had fewer. In the paper all layers share the coefficient; here each layer has
its own, and so each has the target. From the paper's 1e-8 it takes about a hundred steps until the
loss matters, in which a token has about E / 2 experts.

An expert still has a fixed number of slots, made for k experts per token. All largest weights get
slots before any second largest; what finds no slot is dropped. So until the target is reached, many
of the smaller weights are dropped, unless the layer is dropless.

Source: "ReMoE: Fully Differentiable Mixture-of-Experts with ReLU Routing" (arXiv 2412.14711).
"""

import dataclasses
from typing import Annotated, Literal

import jax
import jax.numpy as jnp

from vmoe.axes import Decision, RouterInputs
from vmoe.fields import Positive, more_than
from vmoe.routing.router import State
from vmoe.routing.target_k import TargetK
from vmoe.routing.token_choice import assign_chosen
from vmoe.routing.top_k import top_k

SMALLEST, LARGEST = 1e-30, 1e30  # coefficients, which a factor moves up and down again


@dataclasses.dataclass(frozen=True)
class ReLU(TargetK):
    """Each token uses every expert whose logit is above 0 (ReMoE, arXiv 2412.14711)."""

    kind: Literal["relu"] = "relu"
    """The router."""
    coefficient: Positive = 1e-8
    """Coefficient of the L1 loss at the start."""
    factor: Annotated[float, more_than(1)] = 1.2
    """The coefficient is multiplied or divided by this after each step of training."""

    def __call__(self, inputs: RouterInputs, c: int) -> Decision:
        """The decision's gates are the weights divided by their sum; uniform for no expert."""
        assert inputs.state is not None
        noisy = inputs.noisy_logits
        weights = jax.nn.relu(noisy)
        e = weights.shape[-1]
        largest, experts = top_k(weights, e)  # g s e
        experts = jnp.where(largest > 0, experts, e)
        routing = assign_chosen(largest, experts, inputs.valid, e=e, c=c)
        total = weights.sum(-1, keepdims=True)
        gates = jnp.where(total > 0, weights / jnp.where(total > 0, total, 1), 1 / e)
        real = jnp.where(inputs.valid[..., None], weights, 0)
        tokens = jnp.maximum(inputs.valid.sum(1, dtype=weights.dtype), 1)[:, None]  # g 1
        share = e / (self.target_k * tokens) * (real > 0).sum(1)  # g e
        l1 = inputs.state["coefficient"] * (share * real.sum(1) / tokens).sum(-1)
        return self.decision(inputs, noisy, gates, routing, losses={"l1": l1})

    def initial_state(self, e: int) -> State:
        return {"coefficient": jnp.full((), self.coefficient)}

    def next_state(self, state: State, sums: State) -> State:
        coefficient, k = state["coefficient"], sums["choices"].sum() / sums["tokens"]
        sign = jnp.sign(k - self.target_k).astype(coefficient.dtype)
        return {"coefficient": jnp.clip(coefficient * self.factor**sign, SMALLEST, LARGEST)}
