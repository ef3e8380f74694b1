"""Matmuls of sorted rows with their experts' kernels on a TPU, by the Pallas kernels of megablox.

XLA's own ``ragged_dot`` is a dense product there, of every row with every expert's kernel: always
with libtpu 0.0.52, and with libtpu 0.0.41 if the number of rows is no multiple of 8. Pallas is
imported, which takes seconds, only where a program is lowered for a TPU.
"""

from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax.extend.core import Primitive
from jax.interpreters import ad, batching, mlir
from jaxtyping import Array, Float, Int

DTYPES = (jnp.bfloat16, jnp.float32)
"""Of the rows and kernels of megablox, which accumulates in float32."""
TILE = 128
"""Rows of a tile, which is computed once for each expert with rows in it; unit of its columns."""
BLOCK = 2 << 20
"""Bytes of the largest block. XLA reserves 16 MiB for two of each operand, the sum and the rest."""


def rows_by_kernels(
    rows: Float[Array, "r x"],
    kernel: Float[Array, "e ..."],
    sizes: Int[Array, "e"],
    *,
    transposed: bool = False,
    interpret: bool = False,
) -> Float[Array, "r y"]:
    """Each expert's rows by its kernel (e, x, y), or (e, y, x) if transposed; dtype of the rows.

    The rows of the result after the last expert's are undefined.

    Args:
        interpret: on the CPU, for tests.
    """
    from jax.experimental.pallas.ops.tpu.megablox.gmm import gmm

    x, y = rows.shape[1], kernel.shape[1 if transposed else 2]
    inputs = _tile(x, BLOCK // (TILE * rows.itemsize))  # all, if possible: a kernel is read once
    tiling = TILE, inputs, _tile(y, BLOCK // (inputs * rows.itemsize))
    out = gmm(
        _padded(rows),
        kernel,
        sizes.astype(jnp.int32),
        rows.dtype,
        tiling,
        transpose_rhs=transposed,
        interpret=interpret,
    )
    return out[: len(rows)]


def rows_by_rows(
    rows: Float[Array, "r x"],
    gradient: Float[Array, "r y"],
    sizes: Int[Array, "e"],
    *,
    interpret: bool = False,
) -> Float[Array, "e x y"]:
    """The transposed rows of each expert by the rows of a gradient, in float32.

    Args:
        interpret: on the CPU, for tests.
    """
    from jax.experimental.pallas.ops.tpu.megablox.gmm import tgmm

    inputs = _tile(rows.shape[1], 4 * TILE)
    tiling = TILE, inputs, _tile(gradient.shape[1], BLOCK // (inputs * 4))
    columns, sizes = _padded(rows).swapaxes(0, 1), sizes.astype(jnp.int32)
    return tgmm(columns, _padded(gradient), sizes, jnp.float32, tiling, interpret=interpret)


def on_tpu(function: Callable[..., jax.Array], *inputs: jax.Array, **params: Any) -> jax.Array:
    """function(*inputs), which is traced only when a program with it is lowered for a TPU.

    Args:
        params: ``shape`` and ``dtype`` of the result; ``derivative_of``, a function with the same
            results that has derivatives.
    """
    return KERNEL.bind(*inputs, function=function, **params)


def _padded(rows: jax.Array) -> jax.Array:
    return jnp.pad(rows, ((0, -len(rows) % TILE), (0, 0)))


def _tile(size: int, most: int) -> int:
    """An even share of the columns, at most ``most``: all of them, or a multiple of a tile."""
    parts = -(-size // (most // TILE * TILE))
    return size if parts == 1 else -(-size // (parts * TILE)) * TILE


def _lower(context: mlir.LoweringRuleContext, *inputs: Any, function: Any, **_: Any) -> Any:
    return mlir.lower_fun(function, multiple_results=False)(context, *inputs)


def _jvp(
    primals: Sequence[Any], tangents: Sequence[Any], *, derivative_of: Any, **params: Any
) -> tuple[jax.Array, jax.Array]:
    out = KERNEL.bind(*primals, derivative_of=derivative_of, **params)
    tangents = list(map(ad.instantiate_zeros, tangents))
    return out, jax.jvp(derivative_of, list(primals), tangents)[1]


def _map(inputs: Sequence[jax.Array], axes: Sequence[Any], **params: Any) -> tuple[jax.Array, int]:
    """One kernel after another, under ``jax.vmap``."""
    pairs = list(zip(inputs, axes, strict=True))
    size = next(x.shape[axis] for x, axis in pairs if axis is not None)
    stacked = [batching.bdim_at_front(x, axis, size) for x, axis in pairs]
    return jax.lax.map(lambda each: KERNEL.bind(*each, **params), stacked), 0


KERNEL = Primitive("tpu_kernel")
KERNEL.def_abstract_eval(lambda *_, shape, dtype, **__: jax.core.ShapedArray(shape, dtype))
ad.primitive_jvps[KERNEL] = _jvp
batching.primitive_batchers[KERNEL] = _map
mlir.register_lowering(KERNEL, _lower, platform="tpu")
