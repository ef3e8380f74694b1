"""What a run is evaluated on."""

import dataclasses
from typing import Any, Literal

from vmoe.config.fields import Checked, replace, require
from vmoe.config.model import MoEConfig, ViTConfig
from vmoe.config.routers import Soft, TokenChoice


@dataclasses.dataclass(frozen=True)
class EvalConfig(Checked):
    """What a run is evaluated on while it trains; where a setting is None, the model's own."""

    name: str = "validation"
    """Under which it is reported."""
    data: str = "validation"
    """A split of the data set trained on, or NAME:SPLIT of another (see ``DataConfig.name``)."""
    batch_size: int = 256
    image_size: int | None = None
    """Side in pixels to which the images are resized."""
    k: int | None = None
    """Experts per token, where tokens choose."""
    capacity_factor: float | None = None
    """Of all sparse blocks; the paper evaluates at 4.0."""
    dropless: bool | None = None
    """No capacity, where tokens choose: results do not depend on what shares a batch."""
    priority: Literal["order", "largest_gate", "sum_of_gates", "random"] | None = None
    """Whose choices get the slots first, where tokens choose."""
    images_per_group: int | None = None
    """Most images whose tokens compete for the same slots."""

    def __post_init__(self) -> None:
        super().__post_init__()
        require(bool(self.name), "evaluations: each needs a name")
        require(
            not self.dropless or self.capacity_factor is None,
            f"evaluations.dropless with capacity_factor={self.capacity_factor}: give one of them",
        )
        for name in ("batch_size", "image_size"):
            value = getattr(self, name)
            require(value is None or value >= 1, f"evaluations.{name}={value}: use at least 1")

    def model(self, trained: ViTConfig) -> ViTConfig:
        """The config of a trained model under these settings."""
        size = self.image_size or trained.image_size
        require(
            size % trained.patch_size == 0,
            f"evaluations.image_size={size}: model.patch_size={trained.patch_size} does not divide it",
        )
        if not trained.sparse_blocks:
            return trained
        router = _given(k=self.k, priority=self.priority)
        layer = _given(capacity_factor=self.capacity_factor, images_per_group=self.images_per_group)
        if self.capacity_factor is not None:
            layer |= {"capacity": None, "dropless": False}

        def changed(moe: MoEConfig) -> MoEConfig:
            require(
                not isinstance(moe.router, Soft) or self.capacity_factor is None,
                f"evaluations.capacity_factor={self.capacity_factor}: the slots of a soft router "
                "are parameters, leave it out",
            )
            if not isinstance(moe.router, TokenChoice):
                return replace(moe, **layer)
            changes = layer | _given(dropless=self.dropless)
            if self.dropless:
                changes["capacity"] = None
            return replace(moe, **changes, router=router)

        return replace(
            trained, moe=tuple(changed(trained.moe_of(block)) for block in trained.sparse_blocks)
        )


def _given(**settings: Any) -> dict[str, Any]:
    return {name: value for name, value in settings.items() if value is not None}
