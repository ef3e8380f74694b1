"""The routing that is used at inference: one setting for each sparse block.

``vmoe capacity`` searches it, and writes it as inference.json.
"""

import dataclasses
from typing import Annotated, Literal

from vmoe.config.fields import Checked, Positive, at_least, replace
from vmoe.config.model import MoEConfig, ViTConfig
from vmoe.config.routers import Priority, TokenChoice
from vmoe.errors import require

Unit = Literal["flops", "time"]
"""What a budget counts."""


@dataclasses.dataclass(frozen=True)
class LayerSetting(Checked):
    """The routing of one sparse layer with token choice; see the fields of its configs."""

    section = "inference"

    k: Annotated[int, at_least(1)]
    capacity_factor: Positive
    priority: Priority

    def apply(self, moe: MoEConfig) -> MoEConfig:
        """The config of a layer with this setting, in place of any capacity or dropless.

        Raises:
            UsageError: the layer has another router, or fewer than k experts.
        """
        require(
            isinstance(moe.router, TokenChoice),
            f"router {moe.router.kind}: only token_choice has k, slots and a priority to choose",
        )
        return replace(
            moe,
            capacity_factor=self.capacity_factor,
            capacity=None,
            dropless=False,
            router=dict(k=self.k, priority=self.priority),
        )


@dataclasses.dataclass(frozen=True)
class Inference(Checked):
    """The routing of a model at inference, and how it was chosen."""

    section = "inference"

    blocks: dict[int, LayerSetting]
    """By number of a sparse block."""
    by: Unit
    """What the budget counts."""
    budget: float
    """Largest cost, as a fraction of the cost of the model as trained."""
    cost: float
    """Cost of this routing, as such a fraction."""
    data: str
    """The images on which it was chosen."""
    images: int
    batch_size: int
    step: int | None
    """Training steps of the model on which it was chosen; None if unknown."""
    accuracy: float
    """On these images."""
    accuracy_even: float | None
    """Of the best setting within the budget that is the same in all blocks; None if none is."""
    accuracy_trained: float
    """Of the model as trained."""
    order: str = "as stored"
    """In which the images were read, which decides the groups; older files do not say it."""

    def apply(self, config: ViTConfig) -> ViTConfig:
        """The config of a model with this routing.

        Raises:
            UsageError: the model has other sparse blocks, other routers or fewer than k experts.
        """
        own, given = (", ".join(map(str, x)) or "none" for x in (config.sparse_blocks, self.blocks))
        require(own == given, f"for sparse blocks {given}, but those of this model are {own}")
        layers = tuple(self.blocks[i].apply(moe) for i, moe in config.moe_blocks.items())
        return replace(config, moe=layers)
