"""The arrays that JAX saves for the backward pass, compared with lists by hand."""

import jax
import jax.numpy as jnp
import pytest

from vmoe.costs.residuals import Residual, residuals


def test_residuals_are_counted_once_and_in_their_narrowest_dtype() -> None:
    kernel, x = jax.ShapeDtypeStruct((4, 4), "f4"), jax.ShapeDtypeStruct((8, 4), jnp.bfloat16)

    def rounded(kernel: jax.Array, x: jax.Array) -> jax.Array:
        return jnp.tanh(x.astype(jnp.float32) @ kernel.astype(jnp.bfloat16).astype(jnp.float32))

    assert set(residuals(rounded, kernel, x, platform="tpu")) == {
        Residual(size=16, itemsize=2, of_params=True, is_param=False),
        Residual(size=32, itemsize=2, of_params=False, is_param=False),  # x, before the conversion
        Residual(size=32, itemsize=4, of_params=False, is_param=False),  # the tanh
    }


def test_a_saved_parameter_is_distinguished_from_a_copy_of_it() -> None:
    kernel, x = jax.ShapeDtypeStruct((4, 4), "f4"), jax.ShapeDtypeStruct((8, 4), jnp.bfloat16)
    saved = residuals(lambda kernel, x: x @ kernel, kernel, x, platform="tpu")
    assert Residual(size=16, itemsize=4, of_params=True, is_param=True) in saved


def test_a_number_that_an_array_repeats_is_not_saved_for_each_element() -> None:
    """Dropout divides by a constant, and puts zeros where it drops."""
    x = jax.ShapeDtypeStruct((64, 64), "f4")

    def dropout(x: jax.Array, key: jax.Array) -> jax.Array:
        kept = jax.random.bernoulli(key, 0.5, x.shape)
        return jax.lax.select(kept, x / jnp.full(x.shape, 0.5), jnp.zeros(x.shape))

    saved = residuals(dropout, x, jax.eval_shape(lambda: jax.random.key(0)), platform="gpu")
    large = [residual for residual in saved if residual.size > 1]
    assert large == [Residual(size=64 * 64, itemsize=1, of_params=False, is_param=False)]


def test_each_device_saves_its_part_of_what_depends_on_tokens_and_its_own_copies() -> None:
    kernel, x = jax.ShapeDtypeStruct((4, 16), "f4"), jax.ShapeDtypeStruct((8, 4), "f4")

    def layer(kernel: jax.Array, x: jax.Array) -> jax.Array:
        return jax.nn.gelu(x @ kernel) @ kernel.T

    auto = (jax.sharding.AxisType.Auto,)
    mesh, spec = jax.sharding.AbstractMesh((8,), ("data",), axis_types=auto), jax.P("data")
    specs = dict(in_specs=(jax.P(), spec), out_specs=spec)
    mapped = jax.shard_map(layer, mesh=mesh, **specs, check_vma=False)
    saved = residuals(mapped, kernel, x, platform="tpu")
    whole, parts = (dict(itemsize=4, is_param=False, parts=n) for n in (1, 8))
    assert sorted(saved) == [
        Residual(size=8 * 4, of_params=False, **whole),  # x
        Residual(size=4 * 16, itemsize=4, of_params=True, is_param=True),
        Residual(size=8 * 16, of_params=False, **parts),  # the hidden layer
        Residual(size=8 * 4 * 16, of_params=True, **parts),  # the transposed kernel, on each device
    ]


@pytest.mark.parametrize(("platform", "hidden"), [("cpu", 2), ("gpu", 2), ("tpu", 1)])
def test_what_a_kernel_reads_is_saved_and_on_a_tpu_a_product_is_none(
    platform: str, hidden: int
) -> None:
    """The hidden layer of an MLP before and after its activation, or before it alone."""
    kernel, x = jax.ShapeDtypeStruct((4, 16), "f4"), jax.ShapeDtypeStruct((8, 4), "f4")

    def mlp(kernel: jax.Array, x: jax.Array) -> jax.Array:
        return jax.nn.silu(x @ kernel) @ kernel.T

    saved = residuals(mlp, kernel, x, platform=platform)
    assert [each.size for each in saved if not each.of_params].count(8 * 16) == hidden


@pytest.mark.parametrize(("platform", "hidden"), [("gpu", 2), ("tpu", 1)])
def test_of_a_choice_by_platform_the_part_for_the_platform_counts(
    platform: str, hidden: int
) -> None:
    kernel, x = jax.ShapeDtypeStruct((4, 16), "f4"), jax.ShapeDtypeStruct((8, 4), "f4")

    def mlp(kernel: jax.Array, x: jax.Array) -> jax.Array:
        h = jax.nn.silu(x @ kernel)
        return jax.lax.platform_dependent(
            h, kernel, cpu=lambda h, kernel: jnp.sin(h) @ kernel.T, default=lambda h, k: h @ k.T
        )

    saved = residuals(mlp, kernel, x, platform=platform)
    assert [each.size for each in saved if not each.of_params].count(8 * 16) == hidden


def test_the_rows_that_a_kernel_of_a_tpu_reads_are_saved() -> None:
    kernel, x = jax.ShapeDtypeStruct((2, 4, 4), "f4"), jax.ShapeDtypeStruct((8, 4), "f4")

    def layers(kernel: jax.Array, x: jax.Array) -> jax.Array:
        sizes = jnp.array([3, 5])
        h = jax.nn.silu(jax.lax.ragged_dot(x, kernel, sizes))
        return jax.lax.ragged_dot(h, kernel, sizes)

    saved = residuals(layers, kernel, x, platform="tpu")
    assert [each.size for each in saved if not each.of_params].count(8 * 4) == 3  # x and both
