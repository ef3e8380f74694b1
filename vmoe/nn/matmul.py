"""Matmuls of rows with the experts' kernels, accumulated in float32 at least."""

import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from vmoe.nn import grouped


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def expert_einsum(
    spec: str, rows: Float[Array, "*r x"], kernel: Float[Array, "*e x y"]
) -> jax.Array:
    """einsum(spec, rows, kernel) in the dtype of the rows, accumulated in float32 at least.

    A custom backward pass does the same for the gradients: JAX's own would multiply bfloat16 rows
    by a float32 gradient, which silently computes in float32.

    Args:
        spec: "rows,kernel->result", where each axis occurs in exactly two of the three.
    """
    return _dot(spec, rows, kernel.astype(rows.dtype)).astype(rows.dtype)


def _expert_einsum_forward(spec, rows, kernel):
    return expert_einsum(spec, rows, kernel), (rows, kernel)


def _expert_einsum_backward(spec, saved, gradient):
    rows, kernel = saved
    terms, result_axes = spec.split("->")
    rows_axes, kernel_axes = terms.split(",")
    grad_rows = _dot(
        f"{result_axes},{kernel_axes}->{rows_axes}", gradient, kernel.astype(rows.dtype)
    )
    grad_kernel = _dot(f"{rows_axes},{result_axes}->{kernel_axes}", rows, gradient)
    return grad_rows.astype(rows.dtype), grad_kernel.astype(kernel.dtype)


expert_einsum.defvjp(_expert_einsum_forward, _expert_einsum_backward)


def _dot(spec: str, x: jax.Array, y: jax.Array) -> jax.Array:
    """einsum of two arrays of one dtype, accumulated in float32 at least."""
    wide = jnp.result_type(x, jnp.float32)
    dot = functools.partial(jnp.einsum, spec, preferred_element_type=wide)
    if x.dtype == wide or y.ndim == 2:
        return dot(x, y)

    def on_cpu(x: jax.Array, y: jax.Array) -> jax.Array:
        # XLA's CPU backend has no batched matmul from bfloat16 to float32.
        return dot(x.astype(wide), y.astype(wide))

    return jax.lax.platform_dependent(x, y, cpu=on_cpu, default=dot)


@functools.partial(jax.custom_vjp, nondiff_argnums=(3,))
def ragged_matmul(
    rows: Float[Array, "r x"], kernel: Float[Array, "e x y"], sizes: Int[Array, "e"], block: int = 1
) -> Float[Array, "r y"]:
    """Multiplies each expert's rows by its kernel; dtypes as for ``expert_einsum``.

    Args:
        sizes: number of rows of each expert.
        block: if it is above 1, the product is one batched matmul over blocks of so many rows, each
            with a copy of its expert's kernel; it divides all sizes and r.
    """
    return _by_kernels(rows, kernel.astype(rows.dtype), sizes, block, transposed=False)


def experts_of_blocks(sizes: Int[Array, "e"], count: int, block: int = 1) -> Int[Array, "count"]:
    """The expert of each block of rows; e after the last expert's.

    Args:
        sizes: number of rows of each expert, a multiple of ``block``.
    """
    ends = jnp.cumsum(sizes) // block
    return jnp.searchsorted(ends, jnp.arange(count), side="right", method="compare_all")


def _ragged_forward(rows, kernel, sizes, block):
    return ragged_matmul(rows, kernel, sizes, block), (rows, kernel, sizes)


def _ragged_backward(block, saved, gradient):
    rows, kernel, sizes = saved
    grad_rows = _by_kernels(gradient, kernel.astype(rows.dtype), sizes, block, transposed=True)
    return grad_rows, _by_rows(rows, gradient, sizes, block).astype(kernel.dtype), None


ragged_matmul.defvjp(_ragged_forward, _ragged_backward)

OVER_ROWS = jax.lax.RaggedDotDimensionNumbers(
    dot_dimension_numbers=(((0,), (0,)), ((), ())),
    lhs_ragged_dimensions=[0],
    rhs_group_dimensions=[],
)
"""Contracts over the rows of each expert, for the gradient of its kernel."""


def _by_kernels(
    rows: jax.Array, kernel: jax.Array, sizes: jax.Array, block: int, *, transposed: bool
) -> jax.Array:
    """Each expert's rows by its kernel, or by the transposed one, in the dtype of the rows."""
    if block > 1:
        blocks = rows.reshape(-1, block, rows.shape[1])
        kernels = kernel[experts_of_blocks(sizes, len(blocks), block)]
        out = _dot("irx,iyx->iry" if transposed else "irx,ixy->iry", blocks, kernels)
        return out.reshape(len(rows), -1).astype(rows.dtype)

    def dot(rows: jax.Array, kernel: jax.Array, sizes: jax.Array) -> jax.Array:
        wide = jnp.result_type(rows, jnp.float32)
        kernel = kernel.swapaxes(1, 2) if transposed else kernel
        out = jax.lax.ragged_dot(rows, kernel, sizes, preferred_element_type=wide)
        return out.astype(rows.dtype)

    kernels = functools.partial(grouped.rows_by_kernels, transposed=transposed)
    return _or_on_tpu(dot, kernels, rows, kernel, sizes)


def _by_rows(rows: jax.Array, gradient: jax.Array, sizes: jax.Array, block: int) -> jax.Array:
    """Each expert's transposed rows by those of the gradient, in float32 at least."""
    if block > 1:
        blocks, gradients = (x.reshape(-1, block, x.shape[1]) for x in (rows, gradient))
        experts = experts_of_blocks(sizes, len(blocks), block)
        out = _dot("irx,iry->ixy", blocks, gradients)
        return jax.ops.segment_sum(out, experts, len(sizes), indices_are_sorted=True)
    wide = jnp.result_type(rows, jnp.float32)
    dot = functools.partial(
        jax.lax.ragged_dot_general,
        ragged_dot_dimension_numbers=OVER_ROWS,
        preferred_element_type=wide,
    )
    return _or_on_tpu(dot, grouped.rows_by_rows, rows, gradient, sizes)


def _or_on_tpu(
    function: Callable[..., jax.Array], tpu: Callable[..., jax.Array], *inputs: jax.Array
) -> jax.Array:
    """function(*inputs), or tpu(*inputs) if lowered for a TPU.

    Their results are the same but for rows after the last expert's, which no caller reads.
    """
    if inputs[0].dtype not in grouped.DTYPES:
        return function(*inputs)
    result = jax.eval_shape(function, *inputs)
    about = dict(shape=result.shape, dtype=result.dtype, derivative_of=function)
    on_tpu = functools.partial(grouped.on_tpu, tpu, **about)
    return jax.lax.platform_dependent(*inputs, tpu=on_tpu, default=function)
