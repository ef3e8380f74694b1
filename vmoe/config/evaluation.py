"""Evaluation sets of a run, and the routing settings that an evaluation may override."""

import dataclasses
from typing import Annotated, Any, Literal

from vmoe.config.data import DataConfig
from vmoe.config.model import MoEConfig, ViTConfig
from vmoe.config.preprocessing import Preprocessing
from vmoe.errors import UsageError, naming
from vmoe.fields import Checked, Count, Positive, at_least, replace
from vmoe.routing.priority import Priority

Weights = Literal["raw", "ema"]
"""Parameters of a run: of the last update, or their moving average."""


@dataclasses.dataclass(frozen=True)
class RoutingOverrides(Checked):
    """Routing settings that replace the trained ones; None keeps a setting.

    They apply to all MoE layers, and do not change the parameters.
    """

    section = "routing"

    k: Annotated[int, at_least(1)] | None = None
    """Experts per token; for routers with a k."""
    capacity_factor: Positive | None = None
    """Capacity factor, instead of a fixed capacity or dropless. The authors evaluate V-MoE S/32,
    trained from scratch on ImageNet-1k, at 4.0."""
    capacity: Annotated[int, at_least(1)] | None = None
    """Slots per expert and group, instead of a capacity factor or dropless."""
    dropless: bool | None = None
    """Compute every choice, without a capacity; for routers that can drop a choice. Results then do
    not depend on the batch, up to rounding, unless the router plans for a group (transport)."""
    priority: Priority | None = None
    """Order in which tokens get slots; for routers with a priority."""
    images_per_group: Annotated[int, at_least(1)] | None = None
    """Maximum number of images whose tokens compete for slots; 1 makes images independent, up to
    rounding."""

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in ("capacity_factor", "capacity"):
            self.require(
                not self.dropless or getattr(self, name) is None,
                "dropless layers have no capacity; leave one of them out",
                name,
                "dropless",
            )
        self.require(
            None in (self.capacity_factor, self.capacity),
            "the capacity overrides the factor; leave one of them out",
            "capacity_factor",
            "capacity",
        )

    def apply(self, trained: ViTConfig) -> ViTConfig:
        """The config of a trained model under these settings.

        Raises:
            UsageError: a setting has no effect on any sparse block of this model, or does not fit
                one of them.
        """
        self._check_effect(trained)
        return trained.with_layers(self._layer)

    def _check_effect(self, trained: ViTConfig) -> None:
        routers = [moe.router for moe in trained.moe_blocks.values()]
        kinds = " or ".join(sorted({router.kind for router in routers}))
        for name in self._given():
            reason = ""
            if not routers:
                reason = "no block of this model is sparse"
            elif name == "images_per_group" and self.images_per_group == 1:
                continue  # as it is for a router without groups
            elif not any(router.has(name) for router in routers):
                what = "never drops a choice" if name == "dropless" else f"has no {name}"
                reason = f"router {kinds} {what}"
            elif name in ("capacity_factor", "capacity") and any(
                router.logits_per == "slot" for router in routers
            ):
                reason = "the slots of a soft router are parameters"
            self.require(not reason, f"{reason}, leave it out", name)

    def _layer(self, moe: MoEConfig) -> MoEConfig:
        """The config of one MoE layer; a router ignores settings that it does not have."""
        router, given = moe.router, self._given()
        for name in ("capacity_factor", "capacity", "dropless"):
            if given.get(name) and router.has(name):
                router = router.with_slots(**{name: given.pop(name)})
        own = {name: value for name, value in given.items() if router.has(name)}
        return replace(moe, router=replace(router, **own))

    def _given(self) -> dict[str, Any]:
        """The settings that are not None, by name."""
        settings = dataclasses.asdict(self)
        return {name: value for name, value in settings.items() if value is not None}


@dataclasses.dataclass(frozen=True)
class EvalConfig(Checked):
    """An evaluation set of a run: its data, and the settings of the evaluation."""

    section = "evaluations"

    name: str = "validation"
    """The name under which its results are reported."""
    data: str = "validation"
    """A split of the training data set, or NAME:SPLIT of another (see ``DataConfig.name``)."""
    batch_size: Count = 256
    """Images per batch, over all devices; only images of one batch can compete for slots."""
    image_size: Count | None = None
    """Side in pixels of the images; if None, from ``preprocessing``, or else as trained."""
    preprocessing: Preprocessing | None = None
    """How the images are prepared; if None, by ``data.preprocessing``."""
    routing: RoutingOverrides = RoutingOverrides()

    def __post_init__(self) -> None:
        super().__post_init__()
        self.require(bool(self.name), "each set needs a name", "name")

    def prepare(self, data: DataConfig, model: ViTConfig) -> Preprocessing:
        """How the images of this set are prepared."""
        own = self.preprocessing or data.preprocessing.of_size(model.image_size)
        own = dataclasses.replace(own, max_pixels=data.max_pixels)
        return own.scaled(self.image_size or own.image_size)

    def model(self, trained: ViTConfig) -> ViTConfig:
        """The config of a trained model under the settings of this set."""
        own = self.preprocessing
        size = self.image_size or (own.image_size if own else trained.image_size)
        if size % trained.patch_size:
            fields = {"evaluations.image_size": size, "model.patch_size": trained.patch_size}
            raise UsageError("use a multiple of the patch size", **fields)
        with naming(f"evaluations, set {self.name!r}"):
            return self.routing.apply(trained)
