"""Routing settings for evaluation and prediction, one per sparse block.

``vmoe capacity`` searches them and writes them as routing.json.
"""

import dataclasses
from typing import Annotated, Literal

from vmoe.config.model import MoEConfig, ViTConfig
from vmoe.errors import require
from vmoe.fields import Checked, Positive, at_least, replace
from vmoe.routing import AnyRouter, BiasBalanced, TokenChoice
from vmoe.routing.priority import Priority

Unit = Literal["flops", "time"]
"""What a budget counts."""


COMPARABLE = TokenChoice, BiasBalanced
"""Routers with a k and a priority, with which tokens choose the same experts for any of these and
any number of slots: others can be tried on the choices that were made."""


def is_comparable(router: AnyRouter) -> bool:
    """Whether numbers of slots, priorities and k can be compared without a model for each."""
    return type(router) in COMPARABLE and router.overflow == "drop" and not router.shares


def check_comparable(router: AnyRouter) -> None:
    """Raises a UsageError unless a router ``is_comparable``."""
    kinds = " and ".join(each.kind for each in COMPARABLE)
    problem = f"slots, priorities and k are compared for {kinds} with overflow drop and no shares"
    values = {f"router.{name}": getattr(router, name) for name in ("kind", "overflow", "shares")}
    require(is_comparable(router), problem, **values)


@dataclasses.dataclass(frozen=True)
class LayerSetting(Checked):
    """The routing of one MoE layer, whose router has a k and a priority.

    See ``MoEConfig`` and ``TokenChoice``.
    """

    section = "routing file"

    k: Annotated[int, at_least(1)]
    capacity_factor: Positive
    priority: Priority

    def apply(self, moe: MoEConfig) -> MoEConfig:
        """The layer's config with this setting instead of its capacity or dropless."""
        check_comparable(moe.router)
        router = moe.router.with_slots(capacity_factor=self.capacity_factor)
        return replace(moe, router=replace(router, k=self.k, priority=self.priority))


@dataclasses.dataclass(frozen=True)
class RoutingFile(Checked):
    """The content of a routing.json: the routing of each MoE layer, and how it was chosen."""

    section = "routing file"

    blocks: dict[int, LayerSetting]
    """By the number of the sparse block."""
    by: Unit
    """What the budget counts."""
    budget: float
    """Largest cost, as a fraction of the cost of the model as trained."""
    cost: float
    """Cost of this routing, as a fraction of the same cost."""
    data: str
    """The images that the search used."""
    images: int
    batch_size: int
    step: int | None
    """Training steps of the model that was searched; None if unknown."""
    accuracy: float
    """Accuracy of this routing on these images."""
    accuracy_uniform: float | None
    """Accuracy of the best uniform setting within the budget; None if there is none."""
    accuracy_trained: float
    """Accuracy with the routing as trained."""
    order: str = "as stored"
    """The order in which the images were read; it decides the groups. Older files lack it."""

    def apply(self, config: ViTConfig) -> ViTConfig:
        """The config of a model with this routing.

        Raises:
            UsageError: the model has other sparse blocks, other routers or fewer than k experts.
        """
        own, given = (", ".join(map(str, x)) or "none" for x in (config.sparse_blocks, self.blocks))
        require(own == given, f"for sparse blocks {given}, but those of this model are {own}")
        layers = tuple(self.blocks[i].apply(moe) for i, moe in config.moe_blocks.items())
        return replace(config, moe=layers)
