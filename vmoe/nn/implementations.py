"""Three implementations of the experts; only the random draws of dropout differ between them.

``batched``: batched matmuls over all slots of fixed capacity.
``blocked``: a loop over blocks of rows, each with its expert's weights, so that the hidden layer of
a block stays in the cache; the custom backward pass saves only the pre-activations.
``ragged``: ragged matmuls over sorted rows: by a kernel on a TPU, and on a GPU by a batched matmul
over blocks of rows, each with a copy of its expert's weights. XLA's own, for a CPU, multiplies
every row by the weights of all experts.

Matmuls accumulate in float32, or in float64 for such rows.
"""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from vmoe.nn.keys import MaybeKey
from vmoe.nn.matmul import expert_einsum, experts_of_blocks, ragged_matmul
from vmoe.nn.mlp import Hidden


class ExpertLinearParams(NamedTuple):
    """Parameters of a linear layer of all experts, or of one expert (without axis e).

    x and y stand for d and f, or f and d.
    """

    kernel: Float[Array, "*e x y"]
    bias: Float[Array, "*e y"]

    def __call__(self, rows: Float[Array, "r x"]) -> Float[Array, "r y"]:
        """Applies one expert's layer to rows."""
        return expert_einsum("rx,xy->ry", rows, self.kernel) + self.bias.astype(rows.dtype)

    def select(self, expert: Int[Array, ""]) -> "ExpertLinearParams":
        """One expert's layer."""
        take = functools.partial(jax.lax.dynamic_index_in_dim, index=expert, keepdims=False)
        return ExpertLinearParams(take(self.kernel), take(self.bias))


@functools.partial(jax.jit, static_argnames="middle", inline=True)
def batched(
    up: ExpertLinearParams,
    down: ExpertLinearParams,
    slots: Float[Array, "g e c d"],
    middle: Hidden,
    key: MaybeKey,
) -> Float[Array, "g e c d"]:
    """Applies each expert's MLP to its slots."""

    def linear(params: ExpertLinearParams, rows: jax.Array) -> jax.Array:
        out = expert_einsum("gecx,exy->gecy", rows, params.kernel)
        return out + params.bias[:, None].astype(rows.dtype)

    return middle(linear(up, slots), lambda hidden: linear(down, hidden), key)


@functools.partial(jax.jit, static_argnames=("middle", "block"), inline=True)
def ragged(
    up: ExpertLinearParams,
    down: ExpertLinearParams,
    rows: Float[Array, "r d"],
    sizes: Int[Array, "e"],
    middle: Hidden,
    key: MaybeKey,
    *,
    block: int = 1,
) -> Float[Array, "r d"]:
    """Applies each expert's MLP to its rows; outputs after the last expert's rows are undefined.

    Args:
        sizes: number of rows of each expert.
        block: see ``ragged_matmul``.
    """
    expert = experts_of_blocks(sizes, len(rows))

    def linear(params: ExpertLinearParams, rows: jax.Array) -> jax.Array:
        out = ragged_matmul(rows, params.kernel, sizes, block)
        bias = params.bias.at[expert].get(mode="fill", fill_value=0)
        return out + bias.astype(rows.dtype)

    return middle(linear(up, rows), lambda hidden: linear(down, hidden), key)


@functools.partial(jax.jit, static_argnames=("middle", "block"), inline=True)
def blocked(
    up: ExpertLinearParams,
    down: ExpertLinearParams,
    rows: Float[Array, "r d"],
    sizes: Int[Array, "e"],
    middle: Hidden,
    key: MaybeKey,
    *,
    block: int,
) -> Float[Array, "r d"]:
    """Applies each expert's MLP to its rows; outputs after the last expert's rows are zeros.

    Blocks after the last expert's rows are not computed.

    Args:
        sizes: number of rows of each expert, a multiple of ``block``.
        block: number of rows of a block.
    """
    blocks = rows.reshape(-1, block, rows.shape[1])
    experts, used = experts_of_blocks(sizes, len(blocks), block), sizes.sum() // block
    return _blocked(middle, up, down, blocks, experts, used, key).reshape(rows.shape)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _blocked(middle, up, down, blocks, experts, used, key):
    def step(i, out):
        hidden = up.select(experts[i])(blocks[i])
        return out.at[i].set(middle(hidden, down.select(experts[i]), _block_key(key, i)))

    return jax.lax.fori_loop(0, used, step, jnp.zeros_like(blocks))


def _blocked_forward(middle, up, down, blocks, experts, used, key):
    def step(i, carry):
        out, saved = carry
        hidden = up.select(experts[i])(blocks[i])
        out = out.at[i].set(middle(hidden, down.select(experts[i]), _block_key(key, i)))
        return out, saved.at[i].set(hidden)

    saved = jnp.zeros((*blocks.shape[:2], up.kernel.shape[-1]), blocks.dtype)
    out, saved = jax.lax.fori_loop(0, used, step, (jnp.zeros_like(blocks), saved))
    return out, (up, down, blocks, experts, used, key, saved)


def _blocked_backward(middle, saved, gradient):
    up, down, blocks, experts, used, key, hidden = saved

    def step(i, carry):
        grad_params, grad_blocks = carry
        e = experts[i]
        after_up = functools.partial(middle, key=_block_key(key, i))
        _, vjp = jax.vjp(after_up, hidden[i], down.select(e))
        grad_hidden, grad_down = vjp(gradient[i])
        _, vjp = jax.vjp(ExpertLinearParams.__call__, up.select(e), blocks[i])
        grad_up, grad_block = vjp(grad_hidden)
        grad_params = jax.tree.map(lambda x, y: x.at[e].add(y), grad_params, (grad_up, grad_down))
        return grad_params, grad_blocks.at[i].set(grad_block)

    zeros = jax.tree.map(jnp.zeros_like, ((up, down), blocks))
    (grad_up, grad_down), grad_blocks = jax.lax.fori_loop(0, used, step, zeros)
    return grad_up, grad_down, grad_blocks, None, None, None


_blocked.defvjp(_blocked_forward, _blocked_backward)


def _block_key(key: MaybeKey, block: jax.Array) -> MaybeKey:
    return None if key is None else jax.random.fold_in(key, block)
