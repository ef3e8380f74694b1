"""Gradient accumulation: a batch is computed in parts, one after another, to save memory."""

from collections.abc import Callable
from typing import Any, TypeVar

import jax
import jax.numpy as jnp
from jaxtyping import Array, Key

from vmoe.sharding import Placement
from vmoe.train.lr_factors import Params

Metrics = dict[str, Any]
Inputs = TypeVar("Inputs")
"""Arrays whose first axis is the images."""
Totals = dict[int, dict[str, Array]]
Gradient = tuple[Params, tuple[Metrics, Totals]]
"""The gradient of a mean over images and groups, metrics that are such means, and sums over
tokens."""


def over_parts(
    gradient: Callable[[Inputs, Key[Array, ""]], Gradient],
    inputs: Inputs,
    key: Key[Array, ""],
    *,
    parts: int,
    placement: Placement,
) -> Gradient:
    """A gradient and its metrics, computed from equal parts of a batch and combined.

    Each device cuts its own share of the batch, so no image moves. Memory holds the activations of
    one part at a time, and the sums over the parts.

    Args:
        gradient: function of inputs and a key. With several parts, the key depends on the number of
            the part.
        parts: number of parts.
    """
    if parts == 1:
        return gradient(inputs, key)

    def of_part(inputs: Inputs, number: Array) -> Gradient:
        params, metrics = gradient(inputs, jax.random.fold_in(key, number))
        return placement.like_params(params), metrics

    def add(sums: Gradient, part: tuple[Inputs, Array]) -> tuple[Gradient, None]:
        return jax.tree.map(jnp.add, sums, of_part(*part)), None

    cut = jax.tree.map(lambda x: placement.parts(x, parts), inputs)
    numbered = (cut, jnp.arange(parts))
    shapes = jax.eval_shape(of_part, *jax.tree.map(lambda x: x[0], numbered))
    zeros = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), shapes)
    (params, (means, totals)), _ = jax.lax.scan(add, zeros, numbered)
    params, means = jax.tree.map(lambda x: x / parts, (params, means))
    return params, (means, totals)
