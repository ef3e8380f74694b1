"""Evaluation sets of a run, and the routing settings that an evaluation may override."""

import dataclasses
from typing import Any, Literal

from vmoe.config.data import DataConfig
from vmoe.config.fields import Checked, replace, require, require_count
from vmoe.config.model import MoEConfig, ViTConfig
from vmoe.config.preprocessing import Preprocessing
from vmoe.config.routers import Priority, Soft, TokenChoice
from vmoe.errors import naming

Weights = Literal["raw", "ema"]
"""Which parameters of a run: those of the last update, or their moving average."""
FOR_TOKEN_CHOICE = ("k", "priority", "dropless")
"""The overrides that only layers with token choice have."""


@dataclasses.dataclass(frozen=True)
class RoutingOverrides(Checked):
    """Routing settings that replace those a model was trained with; None keeps a setting.

    They apply to all sparse blocks, and leave the parameters as they are.
    """

    section = "routing"

    k: int | None = None
    """Experts per token; for token choice."""
    capacity_factor: float | None = None
    """Slots per token and choice, in place of a capacity or dropless; V-MoE S/32, trained from
    scratch on ImageNet-1k, is evaluated at 4.0."""
    capacity: int | None = None
    """Slots per expert and group, in place of a capacity factor or dropless."""
    dropless: bool | None = None
    """Whether to compute every choice, without a capacity; for token choice. Results then do not
    depend on the batch, up to rounding."""
    priority: Priority | None = None
    """Which tokens get their slots first; for token choice."""
    images_per_group: int | None = None
    """Maximum number of images whose tokens compete for slots; 1 makes images
    independent, up to rounding."""

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in ("k", "capacity", "images_per_group"):
            value = getattr(self, name)
            require(value is None or value >= 1, f"routing.{name}={value}: use at least 1")
        factor = self.capacity_factor
        require(factor is None or factor > 0, f"routing.capacity_factor={factor}: use more than 0")
        if self.dropless:
            for name in ("capacity_factor", "capacity"):
                require(
                    getattr(self, name) is None,
                    f"routing.{name}={getattr(self, name)} with routing.dropless, which has no "
                    "capacity: leave one of them out",
                )
        require(
            factor is None or self.capacity is None,
            f"routing.capacity_factor={factor} with routing.capacity={self.capacity}, which "
            "overrides it: leave one of them out",
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
        kinds = {type(moe.router) for moe in trained.moe_blocks.values()}
        for name, value in self._given().items():
            reason = ""
            if not kinds:
                reason = "no block of this model is sparse"
            elif name in FOR_TOKEN_CHOICE and TokenChoice not in kinds:
                reason = "no router of this model is token_choice"
            elif name in ("capacity_factor", "capacity") and Soft in kinds:
                reason = "the slots of a soft router are parameters"
            require(not reason, f"routing.{name}={value}: {reason}, leave it out")

    def _layer(self, moe: MoEConfig) -> MoEConfig:
        """The config of one sparse layer; other routers ignore settings for token choice."""
        token_choice, given = isinstance(moe.router, TokenChoice), self._given()
        changes = {x: given[x] for x in given if token_choice or x not in FOR_TOKEN_CHOICE}
        router = {name: changes.pop(name) for name in ("k", "priority") if name in changes}
        if "capacity_factor" in changes or changes.get("dropless"):
            changes["capacity"] = None
        if "capacity_factor" in changes or changes.get("capacity"):
            changes["dropless"] = False
        return replace(moe, **changes, router=router)

    def _given(self) -> dict[str, Any]:
        """The settings that are not None, by name."""
        settings = dataclasses.asdict(self)
        return {name: value for name, value in settings.items() if value is not None}


@dataclasses.dataclass(frozen=True)
class EvalConfig(Checked):
    """An evaluation set of a run: what the model is evaluated on, and with which settings."""

    section = "evaluations"

    name: str = "validation"
    """The name under which its results are reported."""
    data: str = "validation"
    """A split of the training data set, or NAME:SPLIT of another (see ``DataConfig.name``)."""
    batch_size: int = 256
    image_size: int | None = None
    """Side in pixels of the images; if None that of ``preprocessing``, or else as trained."""
    preprocessing: Preprocessing | None = None
    """How the images are prepared; as ``data.preprocessing`` says, without a crop, if None."""
    routing: RoutingOverrides = RoutingOverrides()

    def __post_init__(self) -> None:
        super().__post_init__()
        require(bool(self.name), "evaluations: each needs a name")
        for name in ("batch_size", "image_size"):
            value = getattr(self, name)
            if value is not None:
                require_count(f"evaluations.{name}", value)

    def prepare(self, data: DataConfig, model: ViTConfig) -> Preprocessing:
        """How the images of this set are prepared.

        Args:
            data: of the run.
            model: as trained.
        """
        own = self.preprocessing or data.preprocessing.of_size(model.image_size)
        return own.scaled(self.image_size or own.image_size)

    def model(self, trained: ViTConfig) -> ViTConfig:
        """The config of a trained model under the settings of this set.

        Raises:
            UsageError: the patch size does not divide the image size; or as for
                ``RoutingOverrides.apply``.
        """
        own = self.preprocessing
        size = self.image_size or (own.image_size if own else trained.image_size)
        require(
            size % trained.patch_size == 0,
            f"evaluations.image_size={size}: model.patch_size={trained.patch_size} does not "
            "divide it",
        )
        with naming(f"evaluations, set {self.name!r}"):
            return self.routing.apply(trained)
