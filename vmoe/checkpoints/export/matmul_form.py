"""Rewrites the contractions of a function as matmuls of matrices, or of stacks of matrices.

Runtimes of other formats have fast matmuls and slow general einsums. Values that do not depend on
the input are computed while tracing: they become constants in the form that a matmul needs.
"""

import contextlib
import math
from collections.abc import Callable, Sequence
from typing import Any

import jax
from jax.extend import core

from vmoe.reverse_mode import REVERSE_ONLY

CALLS = {"jit": "jaxpr", "custom_jvp_call": "call_jaxpr", "custom_vjp_call": "call_jaxpr"}
"""Primitives that call a function, and the parameter that holds its program."""


def matmul_form(function: Callable[[jax.Array], Any]) -> Callable[[jax.Array], Any]:
    """The same function of one array; it has no gradient."""

    def rewritten(x: jax.Array) -> Any:
        program, shape = jax.make_jaxpr(function, return_shape=True)(x)
        return jax.tree.unflatten(jax.tree.structure(shape), _evaluate(program, [x]))

    return rewritten


def _evaluate(program: core.ClosedJaxpr, inputs: Sequence[Any]) -> list[Any]:
    jaxpr = program.jaxpr
    values = dict(zip([*jaxpr.constvars, *jaxpr.invars], [*program.consts, *inputs], strict=True))

    def read(atom: Any) -> Any:
        return atom.val if isinstance(atom, core.Literal) else values[atom]

    for eqn in jaxpr.eqns:
        operands = [read(atom) for atom in eqn.invars]
        if eqn.primitive.name == "dot_general":
            results = [_matmul(*operands, **eqn.params)]
        elif eqn.primitive is REVERSE_ONLY:
            results = operands
        elif eqn.primitive.name == "pad" and not any(map(any, eqn.params["padding_config"])):
            results = operands[:1]  # of any number of images, which jax2onnx cannot pad
        elif eqn.primitive.name in CALLS:
            results = _evaluate(eqn.params[CALLS[eqn.primitive.name]], operands)
        else:
            outputs: list[Any] = [out.aval for out in eqn.outvars]
            with _eager_if_known(*operands, *(axis for each in outputs for axis in each.shape)):
                result = eqn.primitive.bind(*operands, **eqn.params)
            results = result if eqn.primitive.multiple_results else [result]
        values.update(zip(eqn.outvars, results, strict=True))
    return [read(atom) for atom in jaxpr.outvars]


def _eager_if_known(*values: Any) -> contextlib.AbstractContextManager[None]:
    """Computes an operation while tracing, if its operands and sizes are known by then."""
    unknown = any(isinstance(x, jax.core.Tracer) or jax.export.is_symbolic_dim(x) for x in values)
    return contextlib.nullcontext() if unknown else jax.ensure_compile_time_eval()


def _matmul(x: jax.Array, y: jax.Array, *, dimension_numbers: Any, **params: Any) -> jax.Array:
    """As ``jax.lax.dot_general``, by a matmul with at most one batch axis."""
    (x_summed, y_summed), (x_batch, y_batch) = dimension_numbers
    x_free = [axis for axis in range(x.ndim) if axis not in (*x_summed, *x_batch)]
    y_free = [axis for axis in range(y.ndim) if axis not in (*y_summed, *y_batch)]
    stacked = bool(x_batch)
    x, (*batch, rows, _) = _merge_axes(x, [x_batch] * stacked + [x_free, x_summed])
    y, (*_, columns) = _merge_axes(y, [y_batch] * stacked + [y_summed, y_free])
    first = tuple(range(stacked))
    dimensions = ((x.ndim - 1,), (y.ndim - 2,)), (first, first)
    with _eager_if_known(x, y):
        out = jax.lax.dot_general(x, y, dimensions, **params)
        return jax.lax.reshape(out, [size for sizes in (*batch, rows, columns) for size in sizes])


def _merge_axes(x: jax.Array, groups: Sequence[Sequence[int]]) -> tuple[jax.Array, list[list[Any]]]:
    """The array with each group of its axes as one, in the order given, and the sizes in each."""
    sizes = [[x.shape[axis] for axis in group] for group in groups]
    with _eager_if_known(x):
        x = jax.lax.transpose(x, [axis for group in groups for axis in group])
        return jax.lax.reshape(x, [math.prod(group) for group in sizes]), sizes
