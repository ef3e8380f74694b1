"""The arrays that a function saves for its backward pass, read from its traced program.

These are the residuals, over which ``jax.vjp`` closes, without those that a compiler recomputes:
it saves what a product, a sort, a gather or random numbers made, and fuses the elementwise
operations that follow. A residual that can be recomputed from arrays that are no larger in all is
not saved if those are, such as a norm's differences from the mean. What a kernel reads is in
memory, so it is saved as well, such as the activated hidden layer of an MLP: on CPUs and GPUs,
where all products are kernels of libraries, and on TPUs for products of sorted rows. Two residuals
can be one array in memory: a compiler reshapes without a copy and recomputes conversions to a wider
dtype.
"""

import dataclasses
import functools
import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
from jax.extend.core import Jaxpr, JaxprEqn, Literal

from vmoe.costs.flops import PRODUCTS, array, inner_jaxprs
from vmoe.nn.grouped import KERNEL

_WITHOUT_COPY = ("reshape", "squeeze", "expand_dims", "convert_element_type", "reverse_only")

_CHEAP = {
    *("abs", "add", "add_any", "and", "broadcast_in_dim", "concatenate", "convert_element_type"),
    *("copy", "div", "eq", "expand_dims", "ge", "gt"),
    *("integer_pow", "iota", "is_finite", "le", "lt", "max", "min"),
    *("mul", "ne", "neg", "not", "one_minus_square", "or", "pad", "reduce_max"),
    *("reduce_min", "reduce_sum", "reshape", "rsqrt", "select_n", "sign", "slice", "split"),
    *("sqrt", "square", "squeeze", "stack", "stop_gradient", "sub", "transpose"),
    *("unstack", "sharding_constraint", "reduce_precision", "reverse_only"),
}
"""Operations that compilers fuse into what reads their results."""

_CHEAP_ON_TPUS = {
    *("erf", "exp", "exp2", "expm1", "log", "log1p", "logistic", "pow", "tanh"),
    *("random_bits", "shift_right_logical", "bitcast_convert_type"),  # of dropout
}
"""Those that only the compiler of TPUs computes again in the backward pass."""

_REPEATED = ("scan", "while", "cond", "reduce", "reduce_window")
"""Operations that do not run their inner program exactly once, on whole arrays."""


class Residual(NamedTuple):
    """A saved array.

    Attributes:
        shape: of the array, or of each part.
        itemsize: bytes per element.
        of_params: whether it depends only on parameters: a parameter, or a rounded copy of one.
        is_param: whether it is a parameter, unchanged.
        parts: number of devices that made one part each, inside a ``jax.shard_map``; else 1.
    """

    shape: tuple[int, ...]
    itemsize: int
    of_params: bool
    is_param: bool
    parts: int = 1

    @property
    def size(self) -> int:
        """Number of elements, of all devices."""
        return math.prod(self.shape) * self.parts


def residuals(
    function: Callable[..., Any], params: Any, *inputs: Any, platform: str
) -> list[Residual]:
    """The arrays saved to differentiate ``function(params, *inputs)`` by all float arguments.

    Args:
        inputs: trees of the same kinds; integers, booleans and keys are not differentiated.
        platform: "cpu", "gpu" or "tpu", for which the program is compiled.
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

    return _saved(jax.make_jaxpr(saved)(leaves).jaxpr, len(jax.tree.leaves(params)), platform)


@dataclasses.dataclass(eq=False)
class _Array:
    """An array of a program, with calls of other programs put in their places.

    Attributes:
        aval: shape and dtype of one of the parts.
        parts: number of devices that have one each, inside a ``jax.shard_map``.
        varying: whether it depends on more than parameters.
        operation: what computes it; None for an input or a constant.
        inputs: the arrays that the operation reads.
    """

    aval: jax.core.ShapedArray
    parts: int
    varying: bool = False
    operation: JaxprEqn | None = None
    inputs: Sequence["_Array"] = ()


def _saved(jaxpr: Jaxpr, params: int, platform: str) -> list[Residual]:
    """The distinct arrays that are saved for a program's outputs.

    An array is recomputed if only elementwise operations and reductions lead to it from arrays that
    are saved, and no kernel reads it.

    Args:
        params: how many of the program's inputs are parameters; they are the first.
    """
    inputs = [_Array(array(var), 1, i >= params) for i, var in enumerate(jaxpr.invars)]
    order = dict.fromkeys(inputs)  # of execution
    outputs = _arrays(jaxpr, inputs, 1, order, platform)
    sources = {_source(x) for x in outputs if x.operation or x in order}
    kernels = (x for x in order if x.operation and _is_kernel(x.operation, platform))
    in_memory = {_source(y) for x in kernels for y in x.inputs}
    saved: dict[_Array, None] = {}

    @functools.cache
    def missing(x: _Array) -> dict[_Array, None]:
        """What has to be saved in addition for an array to be recomputed, at most itself."""
        if x in saved or not x.varying:
            return {}
        if x.operation is None or not _recomputed(x.operation, platform):
            return {x: None}
        return {y: None for z in x.inputs for y in missing(z)}

    for x in order:
        if x not in sources or x in saved:
            continue
        origins = missing(x) if x.varying and x not in in_memory else {x: None}
        saved |= origins if sum(map(_bytes, origins)) <= _bytes(x) else {x: None}
        missing.cache_clear()
    return [
        Residual(x.aval.shape, x.aval.dtype.itemsize, not x.varying, x in inputs[:params], x.parts)
        for x in saved
    ]


def _bytes(x: _Array) -> int:
    return math.prod(x.aval.shape) * x.parts * x.aval.dtype.itemsize


def _arrays(
    jaxpr: Jaxpr, inputs: Sequence[_Array], parts: int, order: dict[_Array, None], platform: str
) -> list[_Array]:
    """The outputs of a program.

    Args:
        order: gets all arrays that operations compute, in order.
    """
    arrays = dict(zip(jaxpr.invars, inputs, strict=True))

    def of(var: Any) -> _Array:
        constant = _Array(array(var), parts)
        return constant if isinstance(var, Literal) else arrays.setdefault(var, constant)

    for equation in jaxpr.eqns:
        inner, read = list(inner_jaxprs(equation)), [of(var) for var in equation.invars]
        name = equation.primitive.name
        if choices := equation.params.get("branches_platforms"):  # jax.lax.platform_dependent
            chosen = next(i for i, of in enumerate(choices) if of is None or platform in of)
            name, inner, read = "platform_dependent", inner[chosen : chosen + 1], read[1:]
        if len(inner) == 1 and name not in _REPEATED and len(inner[0].invars) == len(read):
            times = equation.params["mesh"].size if name == "shard_map" else 1
            outputs = _arrays(inner[0], read, parts * times, order, platform)
        else:
            varying = any(x.varying for x in read)
            outputs = [
                _Array(array(var), parts, varying, equation, read) for var in equation.outvars
            ]
            order |= dict.fromkeys(outputs)
        arrays |= zip(equation.outvars, outputs, strict=True)
    return [of(var) for var in jaxpr.outvars]


def _is_kernel(equation: JaxprEqn, platform: str) -> bool:
    """Whether an operation is a kernel of products, into which nothing is fused."""
    fused = platform == "tpu" and equation.primitive.name in ("dot_general", "conv_general_dilated")
    return equation.primitive.name in (*PRODUCTS, KERNEL.name) and not fused


def _recomputed(equation: JaxprEqn, platform: str) -> bool:
    """Whether an operation is recomputed rather than its results saved."""
    inner = list(inner_jaxprs(equation))
    if inner:
        return all(_recomputed(each, platform) for jaxpr in inner for each in jaxpr.eqns)
    name = equation.primitive.name
    return name in _CHEAP or (platform == "tpu" and name in _CHEAP_ON_TPUS)


def _source(x: _Array) -> _Array | None:
    """The array to save for a residual: before reshapes, in its narrowest dtype.

    For an array that repeats one number it is the number; None if that is a constant.
    """
    while x.operation is not None and x.inputs:
        (before, *_), name = x.inputs, x.operation.primitive.name
        if name == "broadcast_in_dim" and not before.aval.shape:
            if before.operation is None and not before.varying:
                return None
        elif name not in _WITHOUT_COPY or before.aval.dtype.itemsize > x.aval.dtype.itemsize:
            break
        x = before
    return x
