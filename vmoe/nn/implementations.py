"""What the experts compute, in three ways that give the same, up to what dropout draws.

``batched``: one product over all slots of fixed capacity, the way of sharded experts. ``blocked``:
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
from vmoe.nn.matmul import product, ragged_matmul

Implementation = Literal["batched", "blocked", "ragged"]


class ExpertLinearParams(NamedTuple):
    """A linear layer of every expert (x, y stand for d, f or f, d), or of one, without e."""

    kernel: Float[Array, "*e x y"]
    bias: Float[Array, "*e y"]

    def __call__(self, rows: Float[Array, "r x"]) -> Float[Array, "r y"]:
        """One expert's layer on rows."""
        return product("rx,xy->ry", rows, self.kernel) + self.bias.astype(rows.dtype)

    def of(self, expert: Int[Array, ""]) -> "ExpertLinearParams":
        """One expert's layer."""
        return ExpertLinearParams(self.kernel[expert], self.bias[expert])


def batched(
    up: ExpertLinearParams,
    down: ExpertLinearParams,
    slots: Float[Array, "g e c d"],
    rate: float,
    key: MaybeKey,
) -> Float[Array, "g e c d"]:
    """Every expert's MLP on its slots."""

    def linear(linears: ExpertLinearParams, rows: jax.Array) -> jax.Array:
        out = product("gecx,exy->gecy", rows, linears.kernel)
        return out + linears.bias[:, None].astype(rows.dtype)

    return _after_up(linear(up, slots), lambda hidden: linear(down, hidden), rate, key)


def ragged(
    up: ExpertLinearParams,
    down: ExpertLinearParams,
    rows: Float[Array, "r d"],
    sizes: Int[Array, "e"],
    rate: float,
    key: MaybeKey,
) -> Float[Array, "r d"]:
    """Every expert's MLP on its run of rows; what lies behind the last run means nothing."""
    expert = jnp.searchsorted(jnp.cumsum(sizes), jnp.arange(len(rows)), side="right")

    def linear(linears: ExpertLinearParams, rows: jax.Array) -> jax.Array:
        out = ragged_matmul(rows, linears.kernel, sizes)
        bias = linears.bias.at[expert].get(mode="fill", fill_value=0)
        return out + bias.astype(rows.dtype)

    return _after_up(linear(up, rows), lambda hidden: linear(down, hidden), rate, key)


def blocked(
    up: ExpertLinearParams,
    down: ExpertLinearParams,
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
        _, back = jax.vjp(ExpertLinearParams.__call__, up.of(e), blocks[i])
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
