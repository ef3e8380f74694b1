"""How images are attacked: by changes of their pixels, or by their batch-mates."""

import dataclasses
from typing import Literal

from vmoe.config.fields import Checked, require
from vmoe.config.routers import Priority

GradientPath = Literal["all", "experts", "routers"]


@dataclasses.dataclass(frozen=True, kw_only=True)  # so that epsilon comes first below
class AttackMethod(Checked):
    """How images are changed, whatever the largest change is."""

    section = "attack"

    steps: int = 40
    """Steps along the sign of the gradient."""
    project: bool = False
    """False: steps of epsilon / steps, as published. True: steps of 2.5 epsilon / steps, projected
    to changes of at most epsilon and to the range of pixels; always for mates."""
    auxiliary_loss: bool = False
    """Raise the auxiliary losses of the routers as well."""
    path: GradientPath = "all"
    """What is differentiated. all: everything; experts: all but the routing, whose decisions and
    combine weights stay those of the original images; routers: the combine weights alone. The last
    two leave out the auxiliary losses."""

    def __post_init__(self) -> None:
        super().__post_init__()
        require(self.steps >= 1, f"attack.steps={self.steps}: use at least 1")


@dataclasses.dataclass(frozen=True)
class AttackConfig(AttackMethod):
    """How images are changed, and by how much at most."""

    epsilon: float = 8.0
    """Largest change of a pixel, in units of 1/255 of its range."""

    def __post_init__(self) -> None:
        super().__post_init__()
        require(self.epsilon >= 0, f"attack.epsilon={self.epsilon}: use 0 or more")


@dataclasses.dataclass(frozen=True)
class MatesConfig(Checked):
    """Victims, the groups drawn for each, and the routing under which they are tried."""

    section = "mates"

    victims: int = 32
    """Images whose predictions are attacked; their mates come from the whole sample."""
    draws: int = 256
    """Groups drawn for each victim."""
    place: int | None = None
    """The victim's place in its group, from 0; the last if None, where order is worst for it."""
    capacity_factor: tuple[float, ...] = (1.05, 0.5, 0.25)
    """Capacity factors to try."""
    priority: tuple[Priority, ...] = ("order", "largest_gate")
    """Priorities to try at each capacity factor."""
    seed: int = 0
    """Of the draws, and of the random signs."""

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in ("victims", "draws"):
            value = getattr(self, name)
            require(value >= 1, f"mates.{name}={value}: use at least 1")
        for name in ("capacity_factor", "priority"):
            require(bool(getattr(self, name)), f"mates.{name}=(): give at least one")
        require(
            min(self.capacity_factor) > 0,
            f"mates.capacity_factor={self.capacity_factor}: use more than 0",
        )
