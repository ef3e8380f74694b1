"""How batch-mates attack a prediction."""

import dataclasses

from vmoe.config.fields import Checked, require
from vmoe.config.routers import Priority


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
