"""Each token gets k different experts at random, with weights 1/k: a baseline without a gate.

In training the experts depend on the token's draw; in evaluation on its position in the image, so
that they are always the same.
"""

import jax
import jax.numpy as jnp

from vmoe.axes import Decision, RouterInputs
from vmoe.config import MoEConfig
from vmoe.routing import token_choice
from vmoe.routing.top_k import top_k

capacity = token_choice.capacity


def route(inputs: RouterInputs, config: MoEConfig, capacity: int) -> Decision:
    """Routes every group independently; tokens get slots by their order in the group.

    Args:
        inputs: the position of each token; in training a draw for each token.
    """
    e, seeds = config.num_experts, inputs.positions
    if inputs.draw is not None:
        seeds = jax.lax.bitcast_convert_type(inputs.draw, jnp.int32)
    assert seeds is not None
    keys = jax.vmap(jax.vmap(lambda seed: jax.random.fold_in(jax.random.key(0), seed)))(seeds)
    scores = jax.vmap(jax.vmap(lambda key: jax.random.uniform(key, (e,))))(keys)  # g s e
    _, experts = top_k(scores, config.router.experts_per_token)
    return token_choice.evenly_weighted(experts, inputs.valid, e=e, c=capacity)
