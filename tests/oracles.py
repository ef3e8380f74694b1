"""Reference implementations, slow and simple."""

import math
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from vmoe.axes import Record, Routing, SoftRouting
from vmoe.nn.moe import MoE


def queue_by_loop(
    gates: np.ndarray, valid: np.ndarray, *, k: int, c: int, order: np.ndarray
) -> dict[tuple[int, int], tuple[int, int]]:
    """Token choice in one group, by loops over ranks and over tokens in order.

    Returns (token, rank) -> (expert, position) of the kept choices.
    """
    free = [0] * gates.shape[1]
    choices = np.argsort(-gates, axis=1, kind="stable")[:, :k]
    kept = {}
    for rank in range(k):
        for token in order:
            expert = choices[token, rank]
            if valid[token]:
                if free[expert] < c:
                    kept[int(token), rank] = int(expert), free[expert]
                free[expert] += 1
    return kept


def one_hot_slots(gates: np.ndarray, *, k: int, c: int, order: np.ndarray) -> np.ndarray:
    """Token choice by a one-hot cumulative sum: positions (s, e), -1 where a token is not sent."""
    s, e = gates.shape
    choices = np.argsort(-gates, axis=1, kind="stable")[:, :k]
    hot = np.eye(e, dtype=int)[choices[order].T.reshape(-1)]  # rank-major, in order of priority
    position = (np.cumsum(hot, axis=0) - 1) * hot - (1 - hot)
    position = np.where(position < c, position, -1).reshape(k, s, e).max(axis=0)
    slots = np.empty_like(position)
    slots[order] = position
    return slots


def gelu(x: np.ndarray) -> np.ndarray:
    return 0.5 * x * (1 + np.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3)))


def experts_of(moe: MoE) -> Callable[[int, np.ndarray], np.ndarray]:
    """A function that applies expert i of a layer to one row, in float64."""
    params = jax.device_get(nnx.to_pure_dict(nnx.state(moe.experts)))
    up, down = (jax.tree.map(np.float64, params[name]) for name in ("up", "down"))

    def expert(i: int, x: np.ndarray) -> np.ndarray:
        hidden = gelu(x @ up["kernel"][i] + up["bias"][i])
        return hidden @ down["kernel"][i] + down["bias"][i]

    return expert


def moe_by_loop(moe: MoE, groups: np.ndarray, record: Record) -> np.ndarray:
    """The layer's output in float64 for given decisions, one token and one expert at a time."""
    groups, expert = np.asarray(groups, np.float64), experts_of(moe)
    out = np.zeros_like(groups)
    if isinstance(record.routing, SoftRouting):
        dispatch, combine = (np.asarray(x, np.float64) for x in record.routing)
        _, _, experts, c = dispatch.shape
        for g, e, slot in np.ndindex(len(groups), experts, c):
            row = expert(e, dispatch[g, :, e, slot] @ groups[g])
            out[g] += combine[g, :, e, slot, None] * row
        return out
    routing: Routing = record.routing
    kept, weights = np.asarray(routing.kept), np.asarray(routing.weights, np.float64)
    experts = np.asarray(routing.experts)
    for g, s, k in zip(*np.nonzero(kept), strict=True):
        out[g, s] += weights[g, s, k] * expert(experts[g, s, k], groups[g, s])
    return out


def moe_by_einsum(
    params: dict,
    tokens: jax.Array,
    record: Record,
    *,
    scores: Callable[[jax.Array], jax.Array] = jax.nn.softmax,
    normalize: bool,
) -> jax.Array:
    """The layer's output for given decisions as einsums, in the dtype of its inputs (float64).

    Unlike the loop it is differentiable, also with respect to the router's parameters.

    Args:
        params: the layer's parameters as nested dicts; without a router, all scores are equal.
        tokens: the tokens of full groups, without padding.
        scores: the scores of a token, which are its weights, from its logits.
        normalize: whether the weights of a token sum up to 1.
    """
    groups = tokens.reshape(*record.gates.shape[:2], -1)
    routing = record.routing
    router = params.get("gate", {"kernel": jnp.zeros((groups.shape[-1], record.gates.shape[-1]))})
    if isinstance(routing, SoftRouting):
        x, mu = (
            v / jnp.sqrt((v**2).sum(axis, keepdims=True) + 1e-6)
            for v, axis in ((groups, -1), (router["kernel"], 0))
        )
        logits = jnp.einsum("gsd,dec->gsec", x, router["scale"] * mu)
        dispatch, combine = jax.nn.softmax(logits, 1), jax.nn.softmax(logits, (2, 3))
    else:
        gates = scores(groups @ router["kernel"])
        weights = jnp.take_along_axis(gates, routing.experts, axis=-1, mode="clip")
        if normalize:
            weights = weights / weights.sum(-1, keepdims=True)
        _, e, c = routing.choices.shape
        hot = jax.nn.one_hot(routing.slots, e * c, dtype=tokens.dtype)
        hot = hot.reshape(*routing.slots.shape, e, c)
        dispatch, combine = hot.sum(2), jnp.einsum("gskec,gsk->gsec", hot, weights)
    slots = jnp.einsum("gsd,gsec->gecd", groups, dispatch)
    up, down = params["experts"]["up"], params["experts"]["down"]
    hidden = jnp.einsum("gecd,edf->gecf", slots, up["kernel"]) + up["bias"][:, None]
    hidden = 0.5 * hidden * (1 + jnp.tanh(math.sqrt(2 / math.pi) * (hidden + 0.044715 * hidden**3)))
    out = jnp.einsum("gecf,efd->gecd", hidden, down["kernel"]) + down["bias"][:, None]
    return jnp.einsum("gecd,gsec->gsd", out, combine).reshape(tokens.shape)


def one_hot_dispatch(routing: Routing) -> np.ndarray:
    """Routing as a one-hot array (g, s, e, c), built from ``slots`` alone."""
    slots = np.asarray(routing.slots)
    g, s, k = slots.shape
    _, e, c = routing.choices.shape
    hot = np.zeros((g, s, e * c + 1), np.float32)
    for i, j, r in np.ndindex(g, s, k):
        hot[i, j, slots[i, j, r]] += 1
    return hot[..., :-1].reshape(g, s, e, c)


def transport_by_loop(
    values: np.ndarray, *, k: int, line: float, other: float, steps: int = 20, rate: float = 0.01
) -> np.ndarray:
    """A sparse transport plan in float64, by Adam on the semi-dual, one line at a time.

    Args:
        values: (lines, entries); at most k entries of a line are above 0.
        line: the sum of each line.
        other: the sum that each column is to have.
    """

    def plan(duals: np.ndarray) -> np.ndarray:
        rows = np.zeros_like(values)
        for row, value in zip(rows, (values + duals) / line, strict=True):
            largest = np.argsort(-value)[:k]
            for count in range(len(largest), 0, -1):  # entries above 0
                used = largest[:count]
                row[used] = line * (value[used] - (value[used].sum() - 1) / count)
                if row[used].min() > 0:
                    break
                row[used] = 0
        return rows

    duals, first, second = np.zeros(values.shape[1]), 0.0, 0.0
    for step in range(1, steps + 1):
        error = plan(duals).sum(0) - other
        first, second = 0.9 * first + 0.1 * error, 0.999 * second + 0.001 * error**2
        size = np.sqrt(second / (1 - 0.999**step)) + 1e-8
        duals = duals - rate * first / (1 - 0.9**step) / size
        if np.linalg.norm(error) <= 1e-3:
            break
    return plan(duals)
