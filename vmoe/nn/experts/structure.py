"""What modules have in common that can be computed at once: all but the values of variables."""

import itertools
from collections.abc import Collection
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

Path = tuple[Any, ...]
Outline = dict[Path, Any]


def variables_of(module: nnx.Module) -> list[tuple[Path, Any]]:
    """The variables of a module by path, and arrays that are none, each once.

    In the order of the graph: ``nnx.state`` sorts by the keys of the path, which it cannot do with
    those that ``nnx.capture`` adds to a list of modules.
    """
    _, flat = nnx.graphlib.flatten(module, graph=True)
    return list(zip(flat.paths, flat.leaves, strict=True))


def shapes_of(module: nnx.Module) -> tuple[tuple[Path, Any], ...]:
    """The shape and the type of every array of a module, by path."""
    return tuple(
        (path, tuple((jnp.shape(leaf), str(jnp.result_type(leaf))) for leaf in jax.tree.leaves(x)))
        for path, x in variables_of(module)
    )


def outline(module: nnx.Module, shared: Collection[int] = ()) -> Outline:
    """What a module is but for the values of its variables, by path.

    Args:
        shared: ids of variables that stay one, so that modules must hold the same.
    """
    graph = nnx.graphdef(module, graph=True)
    nodes, attributes, found = iter(graph.nodes), iter(graph.attributes), Outline()

    def visit(path: Path) -> None:
        node: Any = next(nodes)
        found[path] = node.index, getattr(node, "type", None), getattr(node, "metadata", None)
        for _ in range(getattr(node, "num_attributes", 0)):
            name, attribute = next(attributes)
            if isinstance(attribute, nnx.graphlib.NodeAttr):
                visit((*path, name))
            else:
                found[*path, name] = getattr(attribute, "value", attribute)

    visit(())
    for path, shapes in shapes_of(module):
        found[path] = found[path], shapes
    for path, x in variables_of(module):
        if id(x) in shared:
            found[path] = found[path], id(x)
    return found


def difference(one: Outline, other: Outline) -> Path | None:
    """The path of something in which two outlines differ; None if they are equal."""
    paths = {**one, **other}
    missing = (path for path in paths if path not in one or path not in other)
    unequal = (path for path in paths if not _equal(one[path], other[path]))
    return next(itertools.chain(missing, unequal), None)


def _equal(one: Any, other: Any) -> bool:
    """Whether two attributes are equal by value: a function, and what has no ``==``, is itself."""
    if one is other:
        return True
    try:
        return type(one) is type(other) and bool(one == other)
    except (TypeError, ValueError):  # of arrays, whose equality is no single value
        return False
