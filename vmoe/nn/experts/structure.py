"""What modules have in common that can be computed at once: all but the values of variables."""

import itertools
import types
from collections.abc import Collection, Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

Path = tuple[Any, ...]
Outline = dict[Path, Any]
CODE = (
    *("co_code", "co_consts", "co_names", "co_varnames", "co_freevars", "co_cellvars", "co_flags"),
    *("co_argcount", "co_posonlyargcount", "co_kwonlyargcount", "co_exceptiontable"),
)
"""What a function computes with, without its name and its place in a file."""


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
    unequal = (path for path in paths if not alike(one[path], other[path]))
    return next(itertools.chain(missing, unequal), None)


def alike(one: Any, other: Any) -> bool:
    """Whether two attributes are equal by value, so that code with either computes the same.

    Functions are compared by their code and by what they can read, other objects by ``==`` if they
    can be hashed, as ``nnx.jit`` does, or by all that they hold.
    """
    seen, pairs = {}, [(one, other)]
    while pairs:
        one, other = pairs.pop()
        if one is other or (id(one), id(other)) in seen:
            continue
        seen[id(one), id(other)] = one, other  # held, so that no other object gets these ids
        if type(one) is not type(other):
            return False
        if not isinstance(one, tuple) and _equal(one, other):
            continue
        parts, others = _parts(one), _parts(other)
        if parts is None or others is None or len(parts) != len(others):
            return False
        pairs += zip(parts, others, strict=True)
    return True


def _equal(one: Any, other: Any) -> bool:
    """Whether two objects of one type can be hashed and are equal."""
    if isinstance(one, float | complex | np.inexact):
        return repr(one) == repr(other)  # 0.0 == -0.0
    try:
        return hash(one) == hash(other) and bool(one == other)
    except (TypeError, ValueError):
        return False


def _parts(value: Any) -> tuple[Any, ...] | None:
    """What determines a value, besides its type; None if only the value itself does."""
    match value:
        case tuple():
            return value
        case types.CodeType():
            return tuple(getattr(value, name) for name in CODE)
        case types.FunctionType():
            cells = [c == types.CellType() or (c.cell_contents,) for c in value.__closure__ or ()]
            defaults = value.__defaults__, value.__kwdefaults__
            return value.__code__, id(value.__globals__), defaults, vars(value), *cells
        case types.MethodType():
            return value.__func__, value.__self__
        case str() | bytes() | int() | float() | complex() | nnx.Variable() | jax.core.Tracer():
            return None
    held = getattr(value, "__dict__", None)  # of which a class may store less
    try:
        reduced = value.__reduce_ex__(4)  # what pickle would store
    except Exception:  # of the object's own code: it cannot be stored
        return None
    if isinstance(reduced, str):  # the name of a global object
        return None
    parts = (tuple(part) if isinstance(part, Iterator) else part for part in reduced)
    return *parts, held
