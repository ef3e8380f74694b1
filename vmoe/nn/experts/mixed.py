"""Experts of different kinds in one layer."""

import warnings
from collections.abc import Iterable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Float

from vmoe.errors import UsageError
from vmoe.nn.experts.copies import (
    Copies,
    check_expert,
    is_stacked,
    shared_variables,
)
from vmoe.nn.experts.interface import Experts, Slots
from vmoe.nn.experts.structure import Outline, difference, outline, shapes_of
from vmoe.nn.keys import MaybeKey, split
from vmoe.trees import path_name


class MixedExperts(Experts):
    """Experts of several kinds, computed one kind after another.

    Parameters: ``kinds``, a list.
    """

    def __init__(self, kinds: Sequence[Experts], order: Sequence[int] | None = None):
        """``order``: the number of each expert in the order of the kinds; if None, 0, 1, 2..."""
        self.kinds = nnx.List(kinds)
        self.num_experts = sum(kind.num_experts for kind in kinds)
        self.asks = frozenset().union(*(kind.asks for kind in kinds))
        self.takes = frozenset().union(*(kind.takes for kind in kinds))
        self.order = tuple(range(self.num_experts) if order is None else order)

    def __call__(
        self,
        tokens: Float[Array, "g e c d"],
        slots: Slots,
        key: MaybeKey = None,
        /,
        *args: Any,
        **kwargs: Any,
    ) -> Float[Array, "g e c x"]:
        first, outputs = 0, []
        for kind, kind_key in zip(self.kinds, split(key, len(self.kinds)), strict=True):
            own = self.order[first : (first := first + kind.num_experts)]
            of_others = self.asks - kind.asks
            named = {name: x for name, x in slots.inputs.items() if name not in of_others}
            rows, inputs = of_experts((tokens, named), own)
            outputs.append(kind(rows, slots._replace(inputs=inputs), kind_key, *args, **kwargs))
        return of_experts(concatenate(outputs, axis=1), self._places)

    def on_same(self, rows: Float[Array, "r d"]) -> Float[Array, "e r x"]:
        """See ``Experts``."""
        outputs = concatenate([kind.on_same(rows) for kind in self.kinds], axis=0)
        return of_experts(outputs[None], self._places)[0]

    def __getitem__(self, number: int) -> nnx.Module:
        place = self._places[number]
        for kind in self.kinds:
            if place < kind.num_experts:
                return kind[place]
            place -= kind.num_experts
        raise IndexError(number)

    @property
    def _places(self) -> list[int]:
        """The place of each expert in the order of the kinds."""
        return sorted(range(self.num_experts), key=self.order.__getitem__)


def of_experts(tree: Any, numbers: Sequence[int]) -> Any:
    """The arrays (g, x, ...) of some experts, from those of all, (g, e, ...)."""
    first, end = numbers[0], numbers[0] + len(numbers)
    if tuple(numbers) != tuple(range(first, end)):
        return jax.tree.map(lambda x: x[:, np.array(numbers)], tree)
    return jax.tree.map(lambda x: x if x.shape[1] == end - first else x[:, first:end], tree)


def concatenate(outputs: Sequence[Array], axis: int) -> Array:
    """The outputs of all kinds."""
    widths = [x.shape[-1] for x in outputs]
    if len(set(widths)) > 1:
        raise UsageError(
            f"the outputs of the experts have different widths, {widths}: make them equal"
        )
    return jnp.concatenate(outputs, axis=axis)


def experts_of(modules: nnx.Module | Iterable[Any], beside: Iterable[nnx.Module] = ()) -> Experts:
    """Experts from one module for each of them; any modules, see ``Copies``.

    Modules of equal structure, in any order, are computed at once, and different ones one after
    another. A module may occur several times, for experts that start equal. What several modules
    hold, such as a frozen base below a part of each one's own, stays one.

    Args:
        modules: one module for each expert; or one whose variables have an axis of experts in
            front, as of ``nnx.vmap``.
        beside: other modules, with which experts may share variables.

    Raises:
        UsageError: there is no module, or something else is given.
    """
    if is_stacked(modules):
        return modules if isinstance(modules, Experts) else Copies(modules)
    if not isinstance(modules, Iterable):
        kind = type(modules).__name__
        raise UsageError("give a list with one module for each expert", experts=kind)
    modules = list(modules)
    for i, module in enumerate(modules):
        check_expert(f"expert {i}", module)
    if not modules:
        raise UsageError("experts is empty: give at least one module")
    shared = shared_variables([*modules, *beside])
    kinds: list[tuple[Outline, list[int]]] = []
    for i, module in enumerate(modules):
        own = outline(module, shared)
        for of_kind, members in kinds:
            if difference(of_kind, own) is None:
                members.append(i)
                break
        else:
            kinds.append((own, [i]))
    _warn_of_attributes(modules, kinds)
    made = [
        Copies([modules[i] for i in members], shared=shared, numbers=members)
        for _, members in kinds
    ]
    order = [i for _, members in kinds for i in members]
    return made[0] if len(made) == 1 else MixedExperts(made, order)


def _warn_of_attributes(
    modules: Sequence[nnx.Module], kinds: Sequence[tuple[Outline, list[int]]]
) -> None:
    """Says which modules could be computed at once, were it not for what is no variable."""
    seen: dict[Any, tuple[Outline, int]] = {}
    for own, (i, *_) in kinds:
        name = type(modules[i]).__qualname__  # also a class that is made again for each expert
        of_kind, other = seen.setdefault((name, shapes_of(modules[i])), (own, i))
        if other != i:
            what = path_name(difference(of_kind, own) or ()) or "their class"
            warnings.warn(
                f"experts {other} and {i} are both {type(modules[i]).__name__} with variables of "
                f"equal shapes, but differ in {what}: {len(kinds)} kinds are computed one after "
                "another",
                stacklevel=3,
            )
            return
