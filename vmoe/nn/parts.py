"""The parts of a model, by which parameters are counted, decayed and monitored."""

from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

STATE = "router state"
SHARED = "shared experts"
PARTS = {  # a word of a parameter's path -> the part it belongs to; the first match wins
    "patches": "patch embedding",
    "class_token": "class token",
    "registers": "registers",
    "positions": "positions",
    "attention_pool": "attention pool",
    "attention": "attention",
    "gate": "routers",
    "experts": "experts",
    "shared": SHARED,
    "shared_gate": SHARED,
    "state": STATE,
    "mlp": "MLPs",
    "head": "head",
}
NORMS = "norms"


def part_of(path: tuple[str | int, ...]) -> str:
    """The part that a parameter belongs to.

    >>> part_of(("blocks", 1, "mlp", "gate", "kernel"))
    'routers'
    >>> part_of(("blocks", 1, "mlp", "experts", "stacked", "attention", "out", "bias"))
    'experts'
    >>> part_of(("blocks", 1, "mlp", "shared", "stacked", "up", "kernel"))
    'shared experts'
    """
    if path[2:3] == ("mlp",) and path[3] in PARTS:  # a part of an MoE layer, whatever is in it
        return PARTS[path[3]]
    return next((part for word, part in PARTS.items() if word in path), NORMS)


@jax.named_scope("norms")
def norms_by_part(tree: Any) -> dict[str, Float[Array, ""]]:
    """The Euclidean norm of each part of a tree with the structure of a model's parameters."""
    squares: dict[str, Array] = {}
    for path, leaf in jax.tree.leaves_with_path(tree):
        part = part_of(tuple(key.key for key in path))
        squares[part] = squares.get(part, 0.0) + jnp.square(leaf).sum()
    return {part: jnp.sqrt(square) for part, square in squares.items()}
