"""Trees of arrays, such as a model's parameters, by the paths of their leaves: blocks/0/norm1/bias.

Code that looks into paths takes them as tuples, from ``flax.traverse_util.flatten_dict``.
"""

from collections.abc import Iterable, Mapping
from typing import Any

import jax
from flax.traverse_util import flatten_dict, unflatten_dict


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


def merged(tree: dict[Any, Any], changes: dict[Any, Any]) -> dict[Any, Any]:
    """Nested dicts with the arrays of other nested dicts added or put in their place.

    >>> merged({"a": {"x": 1, "y": 2}}, {"a": {"x": 3}})
    {'a': {'x': 3, 'y': 2}}
    """
    return unflatten_dict(flatten_dict(tree) | flatten_dict(changes))


def path_name(path: Iterable[str | int]) -> str:
    """A path as text.

    >>> path_name(("blocks", 1, "mlp", "up", "kernel"))
    'blocks/1/mlp/up/kernel'
    """
    return "/".join(map(str, path))
