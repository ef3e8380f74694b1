"""Each token chooses its k experts, whose load is balanced by a bias and not by a loss.

An expert's bias is added to its scores for the choice alone; the combine weights are the scores.
After each step of training the bias rises by ``update_rate`` if the expert had fewer choices than
the mean, and falls if it had more. The paper's main experiments use a sigmoid, whose scores are not
normalized (equation 3 and section 4.1). So this router differs from token choice in more than its
balance: by default it has sigmoid scores and no noise.

Source: "Auxiliary-Loss-Free Load Balancing Strategy for Mixture-of-Experts", section 3 and
algorithm 1 (arXiv 2408.15664).
"""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from vmoe.axes import Decision, RouterInputs
from vmoe.config import BiasBalanced, MoEConfig
from vmoe.routing import token_choice
from vmoe.routing.load import Load
from vmoe.routing.top_k import MASKED, gates_of, top_k

capacity = token_choice.capacity
SMALLEST = 1e-20  # of the weights


def route(inputs: RouterInputs, config: MoEConfig, capacity: int) -> Decision:
    """Routes every group independently.

    The decision's gates are the scores divided by their sum over the experts.

    Args:
        inputs: logits (g, s, e), and the state of ``initial_state``.
    """
    router, state = config.router, inputs.state
    assert isinstance(router, BiasBalanced) and state is not None
    logits = inputs.noisy_logits
    gates = scores = gates_of(logits)
    if router.scores == "sigmoid":
        scores = jax.nn.sigmoid(logits)
        # Of scores that all round to 0 the gates are uniform.
        gates = gates_of(jax.nn.log_sigmoid(logits))
    masked = inputs.logits <= MASKED  # no bias lifts such an expert
    _, experts = top_k(jnp.where(masked, -jnp.inf, scores + state["bias"][:, None]), router.k)
    # A bias can choose experts whose scores round to 0, which could not be normalized.
    weights = jnp.where(masked, 0, jnp.maximum(scores, SMALLEST))
    routing = token_choice.assign_chosen(
        jnp.take_along_axis(gates, experts, axis=-1),
        experts,
        inputs.valid,
        weights=jnp.take_along_axis(weights, experts, axis=-1),
        e=config.num_experts,
        c=capacity,
        priority=router.priority,
        normalize=router.normalize_weights,
        draw=inputs.draw,
    )
    return Decision(gates, routing, {})


def initial_state(config: MoEConfig) -> dict[str, Float[Array, "e"]]:
    """No bias."""
    return {"bias": jnp.zeros(config.num_experts)}


def next_state(
    state: dict[str, Float[Array, "e"]], load: Load, config: MoEConfig
) -> dict[str, Float[Array, "e"]]:
    """The bias after a step with such a load."""
    router = config.router
    assert isinstance(router, BiasBalanced)
    return {
        "bias": state["bias"] + router.update_rate * jnp.sign(load.choices.mean() - load.choices)
    }
