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
        return product(rows, self.kernel) + self.bias.astype(rows.dtype)

    def of(self, expert: Int[Array, ""]) -> "Linears":
        """One expert's layer."""
        return Linears(self.kernel[expert], self.bias[expert])


def batched(
    up: Linears, down: Linears, slots: Float[Array, "g e c d"], rate: float, key: MaybeKey
) -> Float[Array, "g e c d"]:
    """Every expert's MLP on its slots."""

    def linear(linears: Linears, rows: jax.Array) -> jax.Array:
        # XLA's CPU backend has no batched product from bfloat16 to float32.
        cpu = jax.default_backend() == "cpu"
        terms = jnp.float32 if cpu else rows.dtype
        kernel = linears.kernel.astype(rows.dtype).astype(terms)
        out = _dot("gecx,exy->gecy", rows.astype(terms), kernel).astype(rows.dtype)
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
        out = jax.lax.ragged_dot(rows, linears.kernel.astype(rows.dtype), sizes.astype(jnp.int32))
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


@jax.custom_vjp
def product(rows: Float[Array, "r x"], kernel: Float[Array, "x y"]) -> Float[Array, "r y"]:
    """rows @ kernel in the dtype of the rows, added up in float32; so are both gradients.

    Without the backward pass written out, bfloat16 rows would meet a float32 gradient there, and
    the products would silently be float32 ones.
    """
    return _dot("rx,xy->ry", rows, kernel.astype(rows.dtype)).astype(rows.dtype)


def _product_forward(rows, kernel):
    return product(rows, kernel), (rows, kernel)


def _product_backward(saved, gradient):
    rows, kernel = saved
    to_rows = _dot("ry,xy->rx", gradient, kernel.astype(rows.dtype)).astype(rows.dtype)
    return to_rows, _dot("rx,ry->xy", rows, gradient).astype(kernel.dtype)


product.defvjp(_product_forward, _product_backward)

_dot = functools.partial(jnp.einsum, preferred_element_type=jnp.float32)
