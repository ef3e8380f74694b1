"""What the experts compute, in three ways that give the same, up to what dropout draws.

``batched``: one product over all slots of fixed capacity, the way of sharded experts. ``by_block``:
one block of rows after the other, each with its expert's weights, so that the hidden layer of a
block stays in the cache; the backward pass, written out, keeps the pre-activations alone.
``ragged``: products over sorted rows in one kernel, where the platform has one (GPU, TPU).

Products add up in float32 whatever the dtype of the rows.
"""

import functools
from typing import Literal, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, Int

from vmoe.nn import keys
from vmoe.nn.keys import MaybeKey

Computation = Literal["batched", "blocks", "ragged"]


class Linears(NamedTuple):
    """A linear layer of every expert (x, y stand for d, f or f, d), or of one, without e."""

    kernel: Float[Array, "*e x y"]
    bias: Float[Array, "*e y"]

    def __call__(self, rows: Float[Array, "r x"]) -> Float[Array, "r y"]:
        """One expert's layer on rows."""
        return product("rx,xy->ry", rows, self.kernel) + self.bias.astype(rows.dtype)

    def of(self, expert: Int[Array, ""]) -> "Linears":
        """One expert's layer."""
        return Linears(self.kernel[expert], self.bias[expert])


def batched(
    up: Linears, down: Linears, slots: Float[Array, "g e c d"], rate: float, key: MaybeKey
) -> Float[Array, "g e c d"]:
    """Every expert's MLP on its slots."""

    def linear(linears: Linears, rows: jax.Array) -> jax.Array:
        out = product("gecx,exy->gecy", rows, linears.kernel)
        return out + linears.bias[:, None].astype(rows.dtype)

    return _after_up(linear(up, slots), lambda hidden: linear(down, hidden), rate, key)


def ragged(
    up: Linears,
    down: Linears,
    rows: Float[Array, "r d"],
    sizes: Int[Array, "e"],
    rate: float,
    key: MaybeKey,
) -> Float[Array, "r d"]:
    """Every expert's MLP on its run of rows; what lies behind the last run means nothing."""
    expert = jnp.searchsorted(jnp.cumsum(sizes), jnp.arange(len(rows)), side="right")

    def linear(linears: Linears, rows: jax.Array) -> jax.Array:
        out = ragged_product(rows, linears.kernel, sizes)
        bias = linears.bias.at[expert].get(mode="fill", fill_value=0)
        return out + bias.astype(rows.dtype)

    return _after_up(linear(up, rows), lambda hidden: linear(down, hidden), rate, key)


def by_block(
    up: Linears,
    down: Linears,
    rows: Float[Array, "r d"],
    sizes: Int[Array, "e"],
    rate: float,
    key: MaybeKey,
    *,
    block: int,
) -> Float[Array, "r d"]:
    """Every expert's MLP on its run of rows, whose length is a multiple of a block.

    Only as many blocks are computed as have rows; behind the last run there are zeros.
    """
    blocks = rows.reshape(-1, block, rows.shape[1])
    ends = jnp.cumsum(sizes) // block
    experts = jnp.searchsorted(ends, jnp.arange(len(blocks)), side="right")
    return _by_block(rate, up, down, blocks, experts, ends[-1], key).reshape(rows.shape)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _by_block(rate, up, down, blocks, experts, used, key):
    def step(i, out):
        hidden = up.of(experts[i])(blocks[i])
        return out.at[i].set(_after_up(hidden, down.of(experts[i]), rate, _key_of(key, i)))

    return jax.lax.fori_loop(0, used, step, jnp.zeros_like(blocks))


def _by_block_forward(rate, up, down, blocks, experts, used, key):
    def step(i, carry):
        out, kept = carry
        hidden = up.of(experts[i])(blocks[i])
        out = out.at[i].set(_after_up(hidden, down.of(experts[i]), rate, _key_of(key, i)))
        return out, kept.at[i].set(hidden)

    kept = jnp.zeros((*blocks.shape[:2], up.kernel.shape[-1]), blocks.dtype)
    out, kept = jax.lax.fori_loop(0, used, step, (jnp.zeros_like(blocks), kept))
    return out, (up, down, blocks, experts, used, key, kept)


def _by_block_backward(rate, saved, gradient):
    up, down, blocks, experts, used, key, kept = saved

    def step(i, carry):
        to_linears, to_blocks = carry
        e = experts[i]
        second = functools.partial(_after_up, rate=rate, key=_key_of(key, i))
        _, back = jax.vjp(second, kept[i], down.of(e))
        to_hidden, to_down = back(gradient[i])
        _, back = jax.vjp(Linears.__call__, up.of(e), blocks[i])
        to_up, to_block = back(to_hidden)
        to_linears = jax.tree.map(lambda x, y: x.at[e].add(y), to_linears, (to_up, to_down))
        return to_linears, to_blocks.at[i].set(to_block)

    zeros = jax.tree.map(jnp.zeros_like, ((up, down), blocks))
    (to_up, to_down), to_blocks = jax.lax.fori_loop(0, used, step, zeros)
    return to_up, to_down, to_blocks, None, None, None


_by_block.defvjp(_by_block_forward, _by_block_backward)


def _after_up(hidden, down, rate: float, key: MaybeKey) -> jax.Array:
    """down(GELU(hidden)), with dropout after each of the two, as in the dense MLP."""
    dropout = nnx.Dropout(rate)
    inner, outer = keys.split(key, 2)
    hidden = nnx.gelu(hidden, approximate=True)
    hidden = dropout(hidden, deterministic=key is None, rngs=inner)
    return dropout(down(hidden), deterministic=key is None, rngs=outer)


def _key_of(key: MaybeKey, block: jax.Array) -> MaybeKey:
    return None if key is None else jax.random.fold_in(key, block)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def product(spec: str, rows: Float[Array, "*r x"], kernel: Float[Array, "*e x y"]) -> jax.Array:
    """einsum(spec, rows, kernel) in the dtype of the rows, added up in float32; so are both
    gradients.

    Without the backward pass written out, bfloat16 rows would meet a float32 gradient there, and
    the products would silently be float32 ones.

    Args:
        spec: "rows,kernel->result", where each axis is of two of the three.
    """
    return _dot(spec, rows, kernel.astype(rows.dtype)).astype(rows.dtype)


def _product_forward(spec, rows, kernel):
    return product(spec, rows, kernel), (rows, kernel)


def _product_backward(spec, saved, gradient):
    rows, kernel = saved
    terms, of_result = spec.split("->")
    of_rows, of_kernel = terms.split(",")
    to_rows = _dot(f"{of_result},{of_kernel}->{of_rows}", gradient, kernel.astype(rows.dtype))
    to_kernel = _dot(f"{of_rows},{of_result}->{of_kernel}", rows, gradient)
    return to_rows.astype(rows.dtype), to_kernel.astype(kernel.dtype)


product.defvjp(_product_forward, _product_backward)


def _dot(spec: str, x: jax.Array, y: jax.Array) -> jax.Array:
    """einsum in float32 of terms as they are."""
    dot = functools.partial(jnp.einsum, spec, preferred_element_type=jnp.float32)
    if x.dtype == jnp.float32 or y.ndim == 2:
        return dot(x, y)

    def on_cpu(x: jax.Array, y: jax.Array) -> jax.Array:
        # XLA's CPU backend has no batched product from bfloat16 to float32.
        return dot(x.astype(jnp.float32), y.astype(jnp.float32))

    return jax.lax.platform_dependent(x, y, cpu=on_cpu, default=dot)


@jax.custom_vjp
def ragged_product(
    rows: Float[Array, "r x"], kernel: Float[Array, "e x y"], sizes: Int[Array, "e"]
) -> Float[Array, "r y"]:
    """Each expert's run of rows by its kernel; dtypes as for ``product``."""
    return _ragged_dot(rows, kernel.astype(rows.dtype), sizes).astype(rows.dtype)


def _ragged_forward(rows, kernel, sizes):
    return ragged_product(rows, kernel, sizes), (rows, kernel, sizes)


def _ragged_backward(saved, gradient):
    rows, kernel, sizes = saved
    transposed = kernel.swapaxes(1, 2).astype(rows.dtype)
    to_rows = _ragged_dot(gradient, transposed, sizes).astype(rows.dtype)
    to_kernel = jax.lax.ragged_dot_general(
        rows, gradient, sizes, OVER_ROWS, preferred_element_type=jnp.float32
    )
    return to_rows, to_kernel.astype(kernel.dtype), None


ragged_product.defvjp(_ragged_forward, _ragged_backward)

OVER_ROWS = jax.lax.RaggedDotDimensionNumbers(
    dot_dimension_numbers=(((0,), (0,)), ((), ())),
    lhs_ragged_dimensions=[0],
    rhs_group_dimensions=[],
)
"""The sum over each expert's run of rows of the products of two rows' numbers."""

_ragged_dot = functools.partial(jax.lax.ragged_dot, preferred_element_type=jnp.float32)
