"""The settings of attacks."""

import dataclasses
from typing import Annotated, Literal

from vmoe.fields import NOT_EMPTY, Checked, NonNegative, Positive, at_least
from vmoe.routing.priority import Priority

GradientPath = Literal["all", "experts", "routers"]


@dataclasses.dataclass(frozen=True, kw_only=True)  # so that epsilon comes first below
class AttackMethod(Checked):
    """How images are changed, without the largest change."""

    section = "attack"

    steps: Annotated[int, at_least(1)] = 40
    """Steps along the sign of the gradient."""
    project: bool = False
    """False: sign steps of epsilon / steps without projection (arXiv 2210.10253). True: steps of
    2.5 epsilon / steps, projected to changes of at most epsilon and to the range of pixels (PGD).
    """
    auxiliary_loss: bool = False
    """Also raise the auxiliary losses of the routers."""
    gradient_path: GradientPath = "all"
    """all: the full gradient. experts: routing decisions and combine weights are fixed to their
    values for the original images. routers: the gradient through the combine weights alone. The
    last two have no auxiliary losses."""

    def __post_init__(self) -> None:
        super().__post_init__()
        self.require(
            not self.auxiliary_loss or self.gradient_path == "all",
            "this path has no auxiliary losses, use all",
            "gradient_path",
            "auxiliary_loss",
        )


@dataclasses.dataclass(frozen=True)
class AttackConfig(AttackMethod):
    """How images are changed, and by how much at most."""

    epsilon: NonNegative = 8.0
    """Largest change of a pixel, in units of 1/255 of its range."""


@dataclasses.dataclass(frozen=True)
class MatesConfig(Checked):
    """Victims, the groups drawn for each victim, and the routing settings to try."""

    section = "mates"

    victims: Annotated[int, at_least(1)] = 32
    """Images whose predictions are attacked; their mates come from the whole sample."""
    draws: Annotated[int, at_least(1)] = 256
    """Groups drawn for each victim."""
    index: int | None = None
    """Index of the victim in its group, from 0. Default: the last, the worst for priority order."""
    capacity_factor: Annotated[tuple[Positive, ...], NOT_EMPTY] = (1.05, 0.5, 0.25)
    """Capacity factors to try."""
    priority: Annotated[tuple[Priority, ...], NOT_EMPTY] = ("order", "largest_gate")
    """Priorities to try at each capacity factor."""
    seed: int = 0
    """Seed of the draws, and of the random signs."""
