"""The arrays that a function saves for its backward pass, read from its traced program.

These are the residuals, over which ``jax.vjp`` closes. Two residuals can be one array in memory:
the compiler reshapes without a copy, and recomputes conversions to a wider dtype where needed. An
array that repeats one number, such as the zeros of a dropout, is recomputed too.
"""

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
from jax.extend.core import Jaxpr, JaxprEqn, Var

from vmoe.costs.flops import array

_WITHOUT_COPY = ("reshape", "squeeze", "expand_dims", "convert_element_type", "reverse_only")


class Residual(NamedTuple):
    """A saved array.

    Attributes:
        size: number of elements.
        itemsize: bytes per element.
        of_params: whether it depends only on parameters: a parameter, or a rounded copy of one.
        is_param: whether it is a parameter, unchanged.
    """

    size: int
    itemsize: int
    of_params: bool
    is_param: bool


def residuals(function: Callable[..., Any], params: Any, *inputs: Any) -> list[Residual]:
    """The arrays saved to differentiate ``function(params, *inputs)`` by all float arguments.

    Args:
        inputs: trees of the same kinds; integers, booleans and keys are not differentiated.
    """
    leaves, tree = jax.tree.flatten((params, inputs))
    floating = [jax.numpy.issubdtype(leaf.dtype, jax.numpy.floating) for leaf in leaves]

    def saved(leaves: list[jax.Array]) -> list[jax.Array]:
        def of_floating(arrays: list[jax.Array]) -> Any:
            rest = iter(arrays)
            merged = [next(rest) if f else x for f, x in zip(floating, leaves, strict=True)]
            params, inputs = jax.tree.unflatten(tree, merged)
            return function(params, *inputs)

        arrays = [x for f, x in zip(floating, leaves, strict=True) if f]
        return jax.tree.leaves(jax.vjp(of_floating, arrays)[1])

    jaxpr = jax.make_jaxpr(saved)(leaves).jaxpr
    return _outputs(jaxpr, set(jaxpr.invars[: len(jax.tree.leaves(params))]))


def _outputs(jaxpr: Jaxpr, params: set[Var]) -> list[Residual]:
    """The distinct arrays among a program's outputs; ``params`` are among its inputs."""
    producers = {var: equation for equation in jaxpr.eqns for var in equation.outvars}
    varying = set(jaxpr.invars) - params
    for equation in jaxpr.eqns:
        if any(isinstance(var, Var) and var in varying for var in equation.invars):
            varying.update(equation.outvars)
    arrays = dict.fromkeys(_source(var, producers) for var in jaxpr.outvars if isinstance(var, Var))
    return [
        Residual(math.prod(array(v).shape), array(v).dtype.itemsize, v not in varying, v in params)
        for v in arrays
        if v is not None
    ]


def _source(var: Var, producers: dict[Var, JaxprEqn]) -> Var | None:
    """The array to save for a residual: before reshapes, in its narrowest dtype.

    For an array that repeats one number it is the number; None if that is a constant.
    """
    while var in producers:
        (before, *_), name = producers[var].invars, producers[var].primitive.name
        if name == "broadcast_in_dim" and not array(before).shape:
            if not isinstance(before, Var):
                return None
        elif (
            name not in _WITHOUT_COPY
            or not isinstance(before, Var)
            or array(before).dtype.itemsize > array(var).dtype.itemsize
        ):
            break
        var = before
    return var
