"""A threshold that stands in evaluation for a choice among the tokens of a group.

A router that takes the largest scores of a group makes the prediction for an image depend on the
other images. In training it keeps the mean of the smallest scores that it took; in evaluation it
takes every score that is at least as large. The mean is one over all steps at first, and an
exponential one later. A new router's threshold is 0, which every score reaches.

Source: the code of "DiffMoE" (arXiv 2503.14487), whose mean is exponential, with weight 0.05.
"""

import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from vmoe.errors import require
from vmoe.routing.router import State


def no_threshold(shape: tuple[int, ...]) -> State:
    """The state before the first step."""
    return {"threshold": jnp.zeros(shape), "steps": jnp.zeros(())}


def threshold_sums(smallest: Float[Array, "g *e"], valid: Bool[Array, "g s"]) -> State:
    """What ``next_threshold`` needs of each group; a group without a token does not count.

    Args:
        smallest: the smallest score that was taken.
    """
    real = valid.any(1)
    by_group = real.reshape(-1, *(1,) * (smallest.ndim - 1))
    return {"threshold": jnp.where(by_group, smallest, 0), "groups": real.astype(jnp.float32)}


def next_threshold(state: State, sums: State, rate: float) -> State:
    """The state after a step of training.

    Args:
        rate: weight of a step in the mean, at least.
    """
    require("threshold" in sums, "this routing is of evaluation: give the layer a key in training")
    steps = state["steps"] + 1
    mean = sums["threshold"] / jnp.maximum(sums["groups"], 1)
    change = jnp.maximum(rate, 1 / steps) * (mean - state["threshold"])
    return {"threshold": state["threshold"] + change, "steps": steps}
