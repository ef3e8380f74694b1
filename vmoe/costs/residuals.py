"""The arrays that a function saves for its backward pass, read from its traced program.

These are the residuals, over which ``jax.vjp`` closes, without those that a compiler recomputes:
it saves what a product, a sort, a gather or random numbers made, and fuses the elementwise
operations that follow. Two residuals can be one array in memory: a compiler reshapes without a copy
and recomputes conversions to a wider dtype.
"""

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
from jax.extend.core import Jaxpr, JaxprEqn, Var

from vmoe.costs.flops import array, inner_jaxprs

_WITHOUT_COPY = ("reshape", "squeeze", "expand_dims", "convert_element_type", "reverse_only")

_CHEAP = {
    *("abs", "add", "add_any", "and", "broadcast_in_dim", "concatenate", "convert_element_type"),
    *("copy", "div", "eq", "erf", "exp", "exp2", "expand_dims", "expm1", "ge", "gt"),
    *("integer_pow", "iota", "is_finite", "le", "log", "log1p", "logistic", "lt", "max", "min"),
    *("mul", "ne", "neg", "not", "or", "pad", "pow", "reduce_max", "reduce_min", "reduce_sum"),
    *("reshape", "rsqrt", "select_n", "sign", "slice", "split", "sqrt", "square", "squeeze"),
    *("stop_gradient", "sub", "tanh", "transpose", "sharding_constraint", "reduce_precision"),
}
"""Operations that compilers fuse into what reads their results."""


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
    """The distinct arrays among a program's outputs that are saved.

    An array is recomputed if only elementwise operations and reductions lead to it from arrays that
    are saved.

    Args:
        params: those among the program's inputs.
    """
    producers = {var: equation for equation in jaxpr.eqns for var in equation.outvars}
    varying = set(jaxpr.invars) - params
    order = {var: i for i, var in enumerate(jaxpr.invars)}
    for equation in jaxpr.eqns:
        order |= {var: len(order) for var in equation.outvars}
        if any(isinstance(var, Var) and var in varying for var in equation.invars):
            varying.update(equation.outvars)
    sources = [_source(var, producers) for var in jaxpr.outvars if isinstance(var, Var)]
    arrays = {var for var in sources if var is not None}
    known: dict[Var, bool] = {}  # whether an array is saved, or recomputed from such arrays

    def is_known(var: Any) -> bool:
        if not isinstance(var, Var) or var not in varying:
            return True
        if var not in known:
            equation = producers.get(var)
            known[var] = (
                equation is not None
                and _recomputed(equation)
                and all(map(is_known, equation.invars))
            )
        return known[var]

    saved = []
    for var in sorted(arrays, key=order.__getitem__):
        if var in varying and is_known(var):
            continue
        known[var] = True
        shape, of_params = array(var), var not in varying
        saved.append(
            Residual(math.prod(shape.shape), shape.dtype.itemsize, of_params, var in params)
        )
    return saved


def _recomputed(equation: JaxprEqn) -> bool:
    """Whether an operation is recomputed rather than its results saved."""
    inner = list(inner_jaxprs(equation))
    if inner:
        return all(_recomputed(each) for jaxpr in inner for each in jaxpr.eqns)
    return equation.primitive.name in _CHEAP


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
