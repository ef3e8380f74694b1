"""A checksum of an array that is the same however the array is spread over devices.

Each element is mixed with its place in the array to 64 bits, and all are added up: the sum of the
parts is that of the whole, in any order. A changed bit, an element elsewhere or one that is missing
changes the sum; that another array has the same by chance is as likely as 2^-64. It guards against
damage, not against people.
"""

import functools
import math
from typing import Any

import jax
import numpy as np
from jaxtyping import UInt64

from vmoe import distributed

SLAB = 1 << 16  # elements mixed at a time, so that they stay in the cache
ODD = np.uint64(0x9E3779B97F4A7C15)  # 2^64 / golden ratio: spreads places over all bits


def checksums(items: dict[str, Any]) -> dict[str, str]:
    """The checksum of each array of trees of arrays, by item and name; all processes take part.

    >>> checksums({"params": {"head": np.zeros(2, np.float32)}})
    {'params/head': 'float32[2]-509946a41cd733a3'}
    """
    named = {
        jax.tree_util.keystr(path, simple=True, separator="/"): leaf
        for path, leaf in jax.tree.leaves_with_path(items)
    }
    sums = np.array([_of_parts(leaf) for leaf in named.values()], np.uint64)
    total = _total(distributed.process_allgather(sums))
    return {
        name: f"{leaf.dtype}{list(np.shape(leaf))}-{int(value):016x}"
        for (name, leaf), value in zip(named.items(), total, strict=True)
    }


def _of_parts(array: jax.Array | np.ndarray) -> np.uint64:
    """The sum over the parts of an array that this process holds, each part once."""
    if not isinstance(array, jax.Array):
        return _sum(np.asarray(array), np.shape(array), ())
    own = [shard for shard in array.addressable_shards if shard.replica_id == 0]
    return _total([_sum(np.asarray(shard.data), array.shape, shard.index) for shard in own])


def _sum(part: np.ndarray, shape: tuple[int, ...], index: tuple[slice, ...]) -> np.uint64:
    """The sum over a part of an array of a shape, which lies at an index of it."""
    if not part.size:
        return np.uint64(0)
    bits = np.ascontiguousarray(part).view(f"u{part.dtype.itemsize}")
    bits = bits.reshape(len(part) if part.ndim else 1, -1)
    axes = [_places(part, shape, index, axis) for axis in range(part.ndim)] or [np.zeros(1, "u8")]
    inner = functools.reduce(np.add.outer, axes[1:], np.zeros((), np.uint64)).reshape(-1)
    rows = max(1, SLAB // max(1, inner.size))
    return _total(
        [
            _mixed(bits[i : i + rows], np.add.outer(axes[0][i : i + rows], inner))
            for i in range(0, len(bits), rows)
        ]
    )


def _places(
    part: np.ndarray, shape: tuple[int, ...], index: tuple[slice, ...], axis: int
) -> UInt64[np.ndarray, "x"]:
    """What the coordinates along an axis add to the places of elements, counted row by row."""
    first = (index[axis].start or 0) if index else 0
    along = np.arange(first, first + part.shape[axis], dtype=np.uint64)
    return along * np.uint64(math.prod(shape[axis + 1 :]))


def _mixed(bits: np.ndarray, places: np.ndarray) -> np.uint64:
    """The sum of the elements, each mixed with its place (the finaliser of splitmix64)."""
    x = bits.astype(np.uint64) ^ (places * ODD + ODD)
    x ^= x >> np.uint64(30)
    x *= np.uint64(0xBF58476D1CE4E5B9)
    x ^= x >> np.uint64(27)
    x *= np.uint64(0x94D049BB133111EB)
    x ^= x >> np.uint64(31)
    return x.sum(dtype=np.uint64)


def _total(sums: Any) -> Any:
    """Along the first axis, modulo 2^64."""
    return np.array(sums, np.uint64).sum(axis=0, dtype=np.uint64)
