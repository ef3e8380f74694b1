"""The interface of experts, and what they can know about their slots."""

from collections.abc import Collection
from typing import Any, NamedTuple

import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float

from vmoe.axes import Routing, SoftRouting
from vmoe.errors import UsageError, require
from vmoe.nn.keys import MaybeKey
from vmoe.routing.groups import Groups
from vmoe.routing.indexing import rows_at

OF_SLOTS = ("filled", "images", "positions")
"""What experts can ask about their slots: whether a slot has a token of its own, the number of the
token's image in the group, and its position in the image, in [0, n). A slot that has none repeats
another token, with its image and position."""

OF_TOKENS = ("mask", "images", "positions")
"""What a gate can ask about the tokens: whether a token is no padding, the number of its image in
the batch, and its position in the image."""

OF_LAYER = ("n", "s", "key")
"""What else experts and gates can ask for: see ``Slots``, and a key (one for each expert)."""


class Slots(NamedTuple):
    """What experts know about their slots, besides the tokens in them.

    Attributes:
        n: number of tokens of an image.
        s: number of tokens of a group.
        inputs: arrays (g, e, c, ...) or trees of these, by name: what the experts ask for (see
            ``OF_SLOTS``), and the inputs per token that the caller of the layer gave.
    """

    n: int
    s: int
    inputs: dict[str, Any]


class Experts(nnx.Module):
    """The interface of the experts of a layer. A subclass defines ``__call__``.

    Attributes:
        num_experts: number of experts.
        asks: the names in ``OF_SLOTS`` that the experts ask for. Experts that ask may mix the
            tokens in their slots.
        takes: the names in ``OF_LAYER`` that they ask for.
    """

    num_experts: int
    asks: frozenset[str] = frozenset()
    takes: frozenset[str] = frozenset()

    def __call__(
        self,
        tokens: Float[Array, "g e c d"],
        slots: Slots,
        key: MaybeKey = None,
        /,
        *args: Any,
        **kwargs: Any,
    ) -> Float[Array, "g e c x"]:
        """The outputs of the experts for the tokens in their slots.

        Args:
            slots: what is known about the slots.
            key: for dropout; None in evaluation.
            args: inputs that every expert gets as they are.
            kwargs: the same, by name.
        """
        raise NotImplementedError

    def __getitem__(self, number: int) -> nnx.Module:
        """One expert as a module of its own, with a copy of its variables.

        What experts share is no copy, so a layer of such modules shares it too.
        """
        raise NotImplementedError

    def on_same(self, rows: Float[Array, "r d"]) -> Float[Array, "e r x"]:
        """The outputs of all experts for the same rows."""
        tokens = jnp.broadcast_to(rows, (1, self.num_experts, *rows.shape))
        return self(tokens, Slots(1, len(rows), {}))[0]


def about(name: str, routing: Routing | SoftRouting, filled: Any, groups: Groups) -> Array:
    """What experts ask about their slots, (g, e, c); see ``OF_SLOTS``.

    Args:
        filled: the routing with a token in every slot.
    """
    if isinstance(routing, SoftRouting):
        raise UsageError(
            f"experts that ask for {name} need a token in each slot, and soft routing fills slots "
            "with mixtures of tokens: use another router"
        )
    match name:
        case "filled":
            return routing.filled
        case "images":
            return filled.tokens // groups.n
        case "positions":
            return rows_at(groups.positions, filled.tokens)
    raise ValueError(name)


def names_taken(module: Any, owner: str) -> tuple[str, ...]:
    """What a module names in ``takes``, if it has one, after checking that these are names."""
    takes: Any = getattr(module, "takes", ())
    names = isinstance(takes, tuple) and all(isinstance(x, str) for x in takes)
    require(names, f"{owner} is {takes!r}: use a tuple of names, such as ('key',)")
    return takes


def check_names(
    experts: Experts, per_token: Collection[str] | None, others: Collection[str]
) -> None:
    """Checks that no two inputs of the experts have one name.

    Args:
        per_token: names of the caller's inputs with a row for each token.
        others: names of the caller's other inputs.
    """
    if taken := sorted({*(per_token or ()), *others} & (experts.asks | experts.takes)):
        names = ", ".join(taken)
        raise UsageError(f"experts get {names} from the layer: give your input another name")
    if twice := sorted(set(per_token or ()) & set(others)):
        names = ", ".join(twice)
        raise UsageError(f"{names} is given per token and for all: give one of them another name")
