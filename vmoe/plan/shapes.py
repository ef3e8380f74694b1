"""Shapes with shardings, and the memory per device of arrays that are never allocated."""

import math
from typing import Any

import jax


def with_shardings(tree: Any, shardings: Any) -> Any:
    """A tree of shapes, each with its sharding.

    Args:
        tree: of arrays or ``jax.ShapeDtypeStruct``.
        shardings: a tree of the same structure, or one sharding for all; None means one device.
    """
    shapes, structure = jax.tree.flatten(tree)
    leaves = jax.tree.leaves(shardings, is_leaf=lambda x: x is None)
    leaves = leaves * len(shapes) if shardings is None or len(leaves) == 1 else leaves
    return structure.unflatten(
        jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding)
        for x, sharding in zip(shapes, leaves, strict=True)
    )


def shard_shape(array: jax.ShapeDtypeStruct) -> tuple[int, ...]:
    """The shape of one device's shard of an array."""
    return array.sharding.shard_shape(array.shape) if array.sharding else array.shape


def bytes_per_device(tree: Any) -> int:
    """Bytes of one device's shards of a tree of shapes with shardings."""
    return sum(math.prod(shard_shape(x)) * x.dtype.itemsize for x in jax.tree.leaves(tree))
