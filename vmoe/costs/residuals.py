"""What a function keeps from its forward to its backward pass, read from its program.

JAX keeps what ``jax.vjp`` closes over, its residuals. Two of them may be one array to a compiler: a
reshaped one shares its memory, and what was only widened is widened again where it is used.
"""

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
from jax.extend.core import Jaxpr, JaxprEqn, Var

SAME = ("reshape", "squeeze", "expand_dims", "convert_element_type")


class Residual(NamedTuple):
    """An array that is kept.

    Attributes:
        size: elements.
        itemsize: bytes of each.
        of_params: it depends on nothing but parameters: one of them, or a copy, as a rounded one.
        is_param: it is a parameter as it came.
    """

    size: int
    itemsize: int
    of_params: bool
    is_param: bool


def residuals(function: Callable[..., Any], params: Any, *inputs: Any) -> list[Residual]:
    """What is kept to differentiate ``function(params, *inputs)`` by its parameters and inputs.

    Arguments are arrays or their shapes; keys are not differentiated by.
    """
    leaves, tree = jax.tree.flatten((params, inputs))
    smooth = [jax.numpy.issubdtype(leaf.dtype, jax.numpy.floating) for leaf in leaves]

    def kept(leaves: list[jax.Array]) -> list[jax.Array]:
        def of(given: list[jax.Array]) -> Any:
            rest = iter(given)
            both = [next(rest) if s else x for s, x in zip(smooth, leaves, strict=True)]
            params, inputs = jax.tree.unflatten(tree, both)
            return function(params, *inputs)

        given = [x for s, x in zip(smooth, leaves, strict=True) if s]
        return jax.tree.leaves(jax.vjp(of, given)[1])

    jaxpr = jax.make_jaxpr(kept)(leaves).jaxpr
    return _read(jaxpr, set(jaxpr.invars[: len(jax.tree.leaves(params))]))


def _read(jaxpr: Jaxpr, params: set[Var]) -> list[Residual]:
    made = {var: equation for equation in jaxpr.eqns for var in equation.outvars}
    varying = set(jaxpr.invars) - params
    for equation in jaxpr.eqns:
        if any(isinstance(var, Var) and var in varying for var in equation.invars):
            varying.update(equation.outvars)
    arrays = dict.fromkeys(_source(var, made) for var in jaxpr.outvars if isinstance(var, Var))
    return [
        Residual(math.prod(var.aval.shape), _itemsize(var), var not in varying, var in params)
        for var in arrays
    ]


def _source(var: Var, made: dict[Var, JaxprEqn]) -> Var:
    """The array that a residual is, in the shape and type in which it need be kept."""
    while var in made and made[var].primitive.name in SAME:
        (before, *_) = made[var].invars
        if not isinstance(before, Var) or _itemsize(before) > _itemsize(var):
            break
        var = before
    return var


def _itemsize(var: Var) -> int:
    return getattr(var.aval.dtype, "itemsize", 8)
