"""A checksum of an array that does not depend on its sharding.

Each element is hashed with its index in the array to 64 bits, and the hashes are summed, so shards
can be summed separately and in any order. A changed bit, a moved or a missing element changes the
sum; a different array has the same sum with probability 2^-64. It detects corruption, not
tampering.
"""

import functools
import math
from collections.abc import Sequence
from typing import Any

import jax
import numpy as np
from jaxtyping import UInt64

from vmoe import distributed
from vmoe.trees import by_name

CHUNK = 1 << 16  # elements hashed at a time; they fit in the cache
GOLDEN = np.uint64(0x9E3779B97F4A7C15)  # 2^64 / golden ratio: spreads indices over all bits


def checksums(items: dict[str, Any], *, local: bool = False) -> dict[str, str]:
    """The checksum of each array in trees of arrays, by item and path.

    Args:
        local: every process holds all arrays; otherwise this is a collective that sums over the
            shards of all processes.

    >>> checksums({"params": {"head": np.zeros(2, np.float32)}})
    {'params/head': 'float32[2]-509946a41cd733a3'}
    """
    named = by_name(items)
    sums = np.array([_local_sum(leaf) for leaf in named.values()], np.uint64)
    total = sums if local else _total(distributed.process_allgather(sums))
    return {
        name: f"{leaf.dtype}{list(np.shape(leaf))}-{int(value):016x}"
        for (name, leaf), value in zip(named.items(), total, strict=True)
    }


def _local_sum(array: jax.Array | np.ndarray) -> np.uint64:
    """The sum over the shards that this process holds, without replicas."""
    if not isinstance(array, jax.Array):
        return _sum(np.asarray(array), np.shape(array), ())
    local_shards = [shard for shard in array.addressable_shards if shard.replica_id == 0]
    return _total(
        [_sum(np.asarray(shard.data), array.shape, shard.index) for shard in local_shards]
    )


def _sum(part: np.ndarray, shape: tuple[int, ...], index: tuple[slice, ...]) -> np.uint64:
    """The sum over a shard of an array.

    Args:
        part: the shard.
        shape: shape of the whole array.
        index: position of the shard in it; empty if the shard is the whole array.
    """
    if not part.size:
        return np.uint64(0)
    bits = np.ascontiguousarray(part).view(f"u{part.dtype.itemsize}")
    axes = [_indices(part, shape, index, axis) for axis in range(part.ndim)] or [np.zeros(1, "u8")]
    cut = max(1, len(axes) - 1)  # the axes after it fit into a chunk, unless it is the last one
    while cut > 1 and math.prod(part.shape[cut - 1 :]) <= CHUNK:
        cut -= 1
    outer, inner = _index_sums(axes[:cut]), _index_sums(axes[cut:])
    bits = bits.reshape(outer.size, inner.size)
    rows = max(1, CHUNK // inner.size)
    return _total(
        [
            _hashed(bits[i : i + rows], np.add.outer(outer[i : i + rows], inner))
            for i in range(0, len(bits), rows)
        ]
    )


def _index_sums(axes: Sequence[UInt64[np.ndarray, "_"]]) -> UInt64[np.ndarray, "x"]:
    """The sums of all combinations of indices, one from each axis, in row-major order."""
    return functools.reduce(np.add.outer, axes, np.zeros((), np.uint64)).reshape(-1)


def _indices(
    part: np.ndarray, shape: tuple[int, ...], index: tuple[slice, ...], axis: int
) -> UInt64[np.ndarray, "x"]:
    """The contribution of the coordinates along an axis to the row-major index of each element."""
    first = (index[axis].start or 0) if index else 0
    along = np.arange(first, first + part.shape[axis], dtype=np.uint64)
    return along * np.uint64(math.prod(shape[axis + 1 :]))


def _hashed(bits: np.ndarray, indices: np.ndarray) -> np.uint64:
    """The sum of the elements, each hashed with its index (the finalizer of splitmix64)."""
    x = bits.astype(np.uint64) ^ (indices * GOLDEN + GOLDEN)
    x ^= x >> np.uint64(30)
    x *= np.uint64(0xBF58476D1CE4E5B9)
    x ^= x >> np.uint64(27)
    x *= np.uint64(0x94D049BB133111EB)
    x ^= x >> np.uint64(31)
    return x.sum(dtype=np.uint64)


def _total(sums: Any) -> Any:
    """The sum along the first axis, modulo 2^64."""
    return np.array(sums, np.uint64).sum(axis=0, dtype=np.uint64)
