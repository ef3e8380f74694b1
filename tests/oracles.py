"""Slow, obviously right versions of what the package does fast."""

import math

import numpy as np

from vmoe.axes import Record, Routing, SoftRouting
from vmoe.nn.moe import MoE


def queue_by_loop(
    gates: np.ndarray, valid: np.ndarray, *, k: int, c: int, order: np.ndarray
) -> dict[tuple[int, int], tuple[int, int]]:
    """Tokens choose, one group: who gets a slot, by looping over ranks and tokens in order.

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
    """The same by a one-hot cumulative sum: (s, e) positions, -1 where nothing was sent."""
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


def expert(moe: MoE, i: int, x: np.ndarray) -> np.ndarray:
    """One expert of a layer on one row, in float64."""
    up, down = moe.experts.up, moe.experts.down
    kernel1, bias1, kernel2, bias2 = (
        np.asarray(array[...], np.float64)[i]
        for array in (up.kernel, up.bias, down.kernel, down.bias)
    )
    return gelu(x @ kernel1 + bias1) @ kernel2 + bias2


def moe_by_loop(moe: MoE, groups: np.ndarray, record: Record) -> np.ndarray:
    """The layer's output in float64 for given decisions, one token and one expert at a time."""
    groups = np.asarray(groups, np.float64)
    out = np.zeros_like(groups)
    if isinstance(record.routing, SoftRouting):
        dispatch, combine = (np.asarray(x, np.float64) for x in record.routing)
        _, _, experts, c = dispatch.shape
        for g, e, slot in np.ndindex(len(groups), experts, c):
            row = expert(moe, e, dispatch[g, :, e, slot] @ groups[g])
            out[g] += combine[g, :, e, slot, None] * row
        return out
    routing: Routing = record.routing
    kept, weights = np.asarray(routing.kept), np.asarray(routing.weights, np.float64)
    experts = np.asarray(routing.experts)
    for g, s, k in zip(*np.nonzero(kept), strict=True):
        out[g, s] += weights[g, s, k] * expert(moe, experts[g, s, k], groups[g, s])
    return out


def one_hot_dispatch(routing: Routing) -> np.ndarray:
    """Routing as a one-hot array (g, s, e, c), built from ``slots`` alone."""
    slots = np.asarray(routing.slots)
    g, s, k = slots.shape
    _, e, c = routing.choices.shape
    hot = np.zeros((g, s, e * c + 1), np.float32)
    for i, j, r in np.ndindex(g, s, k):
        hot[i, j, slots[i, j, r]] += 1
    return hot[..., :-1].reshape(g, s, e, c)
