"""Each token gets k different experts at random, with weights 1/k: a baseline without a gate.

In training the experts depend on the token's draw; in evaluation on its position in the image, so
that they are always the same.
"""

import dataclasses
import functools
from typing import Annotated, Literal

import jax
import jax.numpy as jnp

from vmoe.axes import Decision, RouterInputs
from vmoe.fields import at_least
from vmoe.routing.router import Router
from vmoe.routing.token_choice import evenly_weighted
from vmoe.routing.top_k import top_k


@dataclasses.dataclass(frozen=True)
class Random(Router):
    """Each token gets k random experts, without a gate: a baseline."""

    kind: Literal["random"] = "random"
    """The router."""
    k: Annotated[int, at_least(1)] = 2
    """Experts per token."""

    logits_per = None
    normalized = True

    def __call__(self, inputs: RouterInputs, c: int) -> Decision:
        e, seeds = inputs.logits.shape[-1], inputs.positions
        if inputs.draw is not None:
            seeds = jax.lax.bitcast_convert_type(inputs.draw, jnp.int32)
        assert seeds is not None
        keys = jax.vmap(jax.vmap(lambda seed: jax.random.fold_in(jax.random.key(0), seed)))(seeds)
        draw = functools.partial(jax.random.uniform, shape=(e,), dtype=jnp.float32)
        scores = jax.vmap(jax.vmap(draw))(keys)  # g s e
        _, experts = top_k(scores, self.k)
        return evenly_weighted(experts, inputs.valid, e=e, c=c)
