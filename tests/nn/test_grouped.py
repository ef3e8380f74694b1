"""Ragged matmuls on accelerators: their products on the CPU, and programs for a TPU, compiled."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from vmoe.nn import grouped
from vmoe.nn.implementations import ExpertLinearParams, ragged
from vmoe.nn.matmul import ragged_matmul
from vmoe.nn.mlp import Hidden

SIZES = ([0, 1, 63, 65, 171], [65, 63, 1, 0, 0], [0, 0, 300, 0, 0], [0, 0, 0, 0, 300], [0] * 5)
"""Rows of each expert, of 300: some tiles of 128 are shared, and some rows are nobody's."""


@pytest.mark.slow
@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_the_kernels_of_a_tpu_equal_a_loop_over_the_experts(dtype: jax.typing.DTypeLike) -> None:
    """The product and both its gradients; the loop is in float64."""
    rng = np.random.default_rng(0)
    drawn = (rng.normal(size=shape) for shape in ((300, 24), (300, 40), (5, 24, 40)))
    rows, gradient, kernel = (jnp.asarray(x, dtype) for x in drawn)
    x, y, w = (np.asarray(a, np.float64) for a in (rows, gradient, kernel))
    exact = 1e-5 if dtype == jnp.float32 else 0.01
    for sizes in map(np.array, SIZES):
        experts = np.repeat(np.arange(5), sizes)
        n, s = len(experts), jnp.int32(sizes)
        for terms, transposed, expected in (
            (rows, False, [x[i] @ w[e] for i, e in enumerate(experts)]),
            (gradient, True, [w[e] @ y[i] for i, e in enumerate(experts)]),
        ):
            out = grouped.rows_by_kernels(terms, kernel, s, transposed=transposed, interpret=True)
            assert out.dtype == dtype and len(out) == 300
            expected = np.reshape(expected, (n, -1 if n else out.shape[1]))
            np.testing.assert_allclose(np.float64(out[:n]), expected, rtol=exact, atol=exact)
        out = grouped.rows_by_rows(rows, gradient, s, interpret=True)
        expected = np.stack([x[:n][experts == e].T @ y[:n][experts == e] for e in range(5)])
        assert out.dtype == jnp.float32
        np.testing.assert_allclose(out, expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_blocks_with_copies_of_kernels_equal_a_loop_over_the_experts(
    dtype: jax.typing.DTypeLike,
) -> None:
    """The product and both its gradients, as on a GPU; rows that are nobody's have no gradient."""
    rng = np.random.default_rng(0)
    drawn = (rng.normal(size=shape) for shape in ((64, 24), (64, 40), (5, 24, 40)))
    rows, gradient, kernel = (jnp.asarray(x, dtype) for x in drawn)
    exact = 1e-5 if dtype == jnp.float32 else 0.05
    for sizes in ([0, 8, 40, 0, 16], [16, 0, 8, 8, 0], [0, 0, 64, 0, 0], [0] * 5):
        n, experts = sum(sizes), np.repeat(np.arange(5), sizes)
        y = jnp.where(jnp.arange(64)[:, None] < n, gradient, 0)
        product = functools.partial(ragged_matmul, sizes=jnp.int32(sizes), block=8)
        out, gradients_of = jax.vjp(product, rows, kernel)
        x, w, g = (np.float32(a) for a in (rows, kernel, y))
        grad_rows, grad_kernel = np.zeros_like(x), np.zeros_like(w)
        for i, e in enumerate(experts):
            np.testing.assert_allclose(np.float32(out[i]), x[i] @ w[e], rtol=exact, atol=exact)
            grad_rows[i] = w[e] @ g[i]
            grad_kernel[e] += np.outer(x[i], g[i])
        assert out.dtype == dtype
        for found, expected in zip(gradients_of(y), (grad_rows, grad_kernel), strict=True):
            np.testing.assert_allclose(np.float32(found), expected, rtol=exact, atol=exact)


def test_ragged_products_are_vectorized() -> None:
    rows, kernels = jnp.ones((2, 300, 3)), jnp.arange(20.0).reshape(2, 5, 1, 2).repeat(3, axis=2)
    together = jax.vmap(ragged_matmul)(rows, kernels, jnp.int32(SIZES[:2]))
    for i, sizes in enumerate(SIZES[:2]):
        n, experts = sum(sizes), np.repeat(np.arange(5), sizes)
        np.testing.assert_array_equal(together[i, :n], 3 * kernels[i, experts, 0])


def test_ragged_products_have_second_derivatives() -> None:
    """In a program, which has the kernels of a TPU, too."""
    rows, kernel = jnp.arange(1.0, 13).reshape(4, 3) / 9, jnp.arange(12.0).reshape(2, 3, 2) / 9

    def loss(rows: jax.Array) -> jax.Array:
        return (ragged_matmul(rows, kernel, jnp.int32([3, 1])) ** 2).sum()

    def squares(rows: jax.Array) -> jax.Array:
        return (jax.grad(loss)(rows) ** 2).sum()

    products = np.stack([kernel[e] @ kernel[e].T for e in (0, 0, 0, 1)])
    expected = 8 * np.einsum("rx,rxy,ryz->rz", rows, products, products)
    np.testing.assert_allclose(jax.jit(jax.grad(squares))(rows), expected, rtol=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_ragged_experts_compiled_for_a_tpu_multiply_rows_by_no_other_experts_kernel(
    monkeypatch: pytest.MonkeyPatch, dtype: jax.typing.DTypeLike
) -> None:
    """By the compiler's count of a training step: a dense product has 16 times the FLOPs."""
    pytest.importorskip("libtpu")
    from jax.experimental import topologies

    monkeypatch.setenv("TPU_SKIP_MDS_QUERY", "1")
    monkeypatch.setenv("ALLOW_MULTIPLE_LIBTPU_LOAD", "1")  # no TPU is opened
    topology = topologies.get_topology_desc(platform="tpu", topology_name="v5e:2x2")
    device = jax.sharding.SingleDeviceSharding(topology.devices[0])
    r, d, f, e = 1003, 256, 640, 16

    def array(*shape: int, dtype: jax.typing.DTypeLike = jnp.float32) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct(shape, dtype, sharding=device)

    def loss(params: tuple, rows: jax.Array, sizes: jax.Array) -> jax.Array:
        return (ragged(*params, rows, sizes, Hidden("relu"), None) ** 2).sum()

    up = ExpertLinearParams(array(e, d, f), array(e, f))
    down = ExpertLinearParams(array(e, f, d), array(e, d))
    inputs = (up, down), array(r, d, dtype=dtype), array(e, dtype=jnp.int32)
    program = jax.jit(jax.value_and_grad(loss, argnums=(0, 1))).lower(*inputs).compile()
    assert program.cost_analysis()["flops"] < 1.2 * 6 * (2 * r * d * f)
    assert program.memory_analysis().temp_size_in_bytes < 5 * r * f * 4
