"""Experts of different kinds in one layer."""

import itertools
from collections.abc import Sequence
from typing import Any

import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float

from vmoe.errors import UsageError
from vmoe.nn.experts.copies import Copies, check_expert, structure
from vmoe.nn.experts.interface import Experts, Slots
from vmoe.nn.keys import MaybeKey, split


class MixedExperts(Experts):
    """Experts of several kinds, computed one kind after another.

    Parameters: ``kinds``, a list.
    """

    def __init__(self, kinds: Sequence[Experts]):
        """The experts are numbered in the order of the kinds."""
        self.kinds = nnx.List(kinds)
        self.num_experts = sum(kind.num_experts for kind in kinds)
        self.asks = frozenset().union(*(kind.asks for kind in kinds))

    def __call__(
        self,
        tokens: Float[Array, "g e c d"],
        slots: Slots,
        key: MaybeKey = None,
        *args: Any,
        **kwargs: Any,
    ) -> Float[Array, "g e c x"]:
        first, outputs = 0, []
        for kind, kind_key in zip(self.kinds, split(key, len(self.kinds)), strict=True):
            own = slice(first, first := first + kind.num_experts)
            outputs.append(kind(tokens[:, own], slots.of(own), kind_key, *args, **kwargs))
        return concatenate(outputs, axis=1)

    def on_same(self, rows: Float[Array, "r d"]) -> Float[Array, "e r x"]:
        """See ``Experts``."""
        return concatenate([kind.on_same(rows) for kind in self.kinds], axis=0)


def concatenate(outputs: Sequence[Array], axis: int) -> Array:
    """The outputs of all kinds."""
    widths = [x.shape[-1] for x in outputs]
    if len(set(widths)) > 1:
        raise UsageError(
            f"the outputs of the experts have different widths, {widths}: make them equal"
        )
    return jnp.concatenate(outputs, axis=axis)


def experts_of(modules: Sequence[Any]) -> Experts:
    """Experts from one module for each of them; any modules, see ``Copies``.

    Modules of equal structure that follow each other are computed at once. A module may occur
    several times, for experts that start equal.

    Raises:
        UsageError: there is no module, or one has state other than parameters.
    """
    if not isinstance(modules, Sequence):
        kind = type(modules).__name__
        raise UsageError("give a list with one module for each expert", experts=kind)
    for i, module in enumerate(modules):
        check_expert(f"expert {i}", module)
    kinds = [Copies(list(alike)) for _, alike in itertools.groupby(modules, structure)]
    if not kinds:
        raise UsageError("experts is empty: give at least one module")
    return kinds[0] if len(kinds) == 1 else MixedExperts(kinds)
