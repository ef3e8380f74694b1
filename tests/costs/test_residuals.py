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
        Residual((4, 4), itemsize=2, of_params=True, is_param=False),
        Residual((8, 4), itemsize=2, of_params=False, is_param=False),  # x, before the conversion
        Residual((8, 4), itemsize=4, of_params=False, is_param=False),  # the tanh
    }


def test_a_saved_parameter_is_distinguished_from_a_copy_of_it() -> None:
    kernel, x = jax.ShapeDtypeStruct((4, 4), "f4"), jax.ShapeDtypeStruct((8, 4), jnp.bfloat16)
    saved = residuals(lambda kernel, x: x @ kernel, kernel, x, platform="tpu")
    assert Residual((4, 4), itemsize=4, of_params=True, is_param=True) in saved


def test_a_number_that_an_array_repeats_is_not_saved_for_each_element() -> None:
    """Dropout divides by a constant, and puts zeros where it drops."""
    x = jax.ShapeDtypeStruct((64, 64), "f4")

    def dropout(x: jax.Array, key: jax.Array) -> jax.Array:
        kept = jax.random.bernoulli(key, 0.5, x.shape)
        return jax.lax.select(kept, x / jnp.full(x.shape, 0.5), jnp.zeros(x.shape))

    saved = residuals(dropout, x, jax.eval_shape(lambda: jax.random.key(0)), platform="gpu")
    large = [residual for residual in saved if residual.size > 1]
    assert large == [Residual((64, 64), itemsize=1, of_params=False, is_param=False)]


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
    assert set(saved) == {
        Residual((8, 4), of_params=False, **whole),  # x
        Residual((4, 16), itemsize=4, of_params=True, is_param=True),
        Residual((1, 16), of_params=False, **parts),  # the hidden layer
        Residual((16, 4), of_params=True, **parts),  # the transposed kernel, on each device
    }


@pytest.mark.parametrize(("platform", "hidden"), [("cpu", 3), ("gpu", 3), ("tpu", 1)])
def test_what_a_kernel_reads_is_saved_and_on_a_tpu_a_product_is_none(
    platform: str, hidden: int
) -> None:
    """The hidden layer of an MLP, its sigmoid and the activated one, or the first alone."""
    kernel, x = jax.ShapeDtypeStruct((4, 16), "f4"), jax.ShapeDtypeStruct((8, 4), "f4")

    def mlp(kernel: jax.Array, x: jax.Array) -> jax.Array:
        return jax.nn.silu(x @ kernel) @ kernel.T

    saved = residuals(mlp, kernel, x, platform=platform)
    assert [each.size for each in saved if not each.of_params].count(8 * 16) == hidden


@pytest.mark.parametrize(("platform", "hidden"), [("gpu", 3), ("tpu", 1)])
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


def test_a_norm_saves_its_input_and_not_float32_differences_from_the_mean() -> None:
    tokens = jax.ShapeDtypeStruct((64, 64), jnp.bfloat16)

    def norm(_: None, tokens: jax.Array) -> jax.Array:
        wide = tokens.astype(jnp.float32)
        centred = wide - wide.mean(-1, keepdims=True)
        normed = centred * jax.lax.rsqrt((centred**2).mean(-1, keepdims=True) + 1e-6)
        return normed.astype(jnp.bfloat16)

    saved = residuals(norm, None, tokens, platform="gpu")
    assert [(each.shape, each.itemsize) for each in saved if each.size > 64] == [((64, 64), 2)]


@pytest.mark.parametrize(
    ("platform", "itemsizes"), [("cpu", [4, 4]), ("gpu", [4, 4]), ("tpu", [4])]
)
def test_only_on_tpus_is_an_exponential_computed_twice(platform: str, itemsizes: list[int]) -> None:
    x = jax.ShapeDtypeStruct((8, 4), "f4")
    saved = residuals(lambda _, x: x * jnp.exp(x), None, x, platform=platform)
    assert [each.itemsize for each in saved] == itemsizes


@pytest.mark.parametrize(("platform", "masks"), [("gpu", 1), ("tpu", 0)])
def test_the_mask_of_dropout_is_saved_on_gpus_and_drawn_again_on_tpus(
    platform: str, masks: int
) -> None:
    x, key = jax.ShapeDtypeStruct((64, 64), "f4"), jax.eval_shape(lambda: jax.random.key(0))

    def dropout(_: None, x: jax.Array, key: jax.Array) -> jax.Array:
        return jnp.where(jax.random.bernoulli(key, 0.5, x.shape), 2 * x, 0)

    saved = residuals(dropout, None, x, key, platform=platform)
    assert sum(each.itemsize == 1 for each in saved) == masks
