"""The name that older versions gave to the gate of an MoE layer: ``router``."""

import re
from typing import Any

import jax

OLDER, CURRENT = "router", "gate"


def current_name(name: str) -> str:
    """The name of a parameter that an older version wrote.

    >>> current_name("blocks/1/mlp/router/kernel")
    'blocks/1/mlp/gate/kernel'
    """
    return re.sub(rf"(^|/)(blocks/\d+/mlp)/{OLDER}/", rf"\1\2/{CURRENT}/", name)


def renamed(tree: Any, name: str, other: str) -> Any:
    """A tree of dicts, such as parameters or moments of them, with other names of gates."""

    def is_layer(node: Any) -> bool:
        return isinstance(node, dict) and name in node

    def layer(node: Any) -> Any:
        if not is_layer(node):
            return node
        return {other if key == name else key: value for key, value in node.items()}

    return jax.tree.map(layer, tree, is_leaf=is_layer)
