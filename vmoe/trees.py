"""Trees of arrays, such as a model's parameters, by the paths of their leaves: blocks/0/norm1/bias.

Code that looks into paths takes them as tuples, from ``flax.traverse_util.flatten_dict``.
"""

from collections.abc import Iterable, Mapping
from typing import Any

import jax
from flax.traverse_util import unflatten_dict


def by_name(tree: Any) -> dict[str, Any]:
    """The arrays of a tree by their path: params/head/bias."""
    return {
        jax.tree_util.keystr(path, simple=True, separator="/"): leaf
        for path, leaf in jax.tree.leaves_with_path(tree)
    }


def nested(arrays: Mapping[str, Any]) -> dict[Any, Any]:
    """Arrays by path as nested dicts, where the keys of blocks are numbers.

    >>> nested({"blocks/1/norm1/scale": 0})
    {'blocks': {1: {'norm1': {'scale': 0}}}}
    """
    return unflatten_dict(
        {
            tuple(int(part) if part.isdigit() else part for part in path.split("/")): value
            for path, value in arrays.items()
        }
    )


def path_name(path: Iterable[str | int]) -> str:
    """A path as text.

    >>> path_name(("blocks", 1, "mlp", "up", "kernel"))
    'blocks/1/mlp/up/kernel'
    """
    return "/".join(map(str, path))
