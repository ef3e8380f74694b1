"""A trained model as arrays, and where it comes from."""

from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

import jax

from vmoe import models
from vmoe.config import TrainConfig, ViTConfig
from vmoe.config.evaluation import Weights
from vmoe.config.preprocessing import Preprocessing
from vmoe.config.train import Loss

if TYPE_CHECKING:
    from vmoe.nn.vit import ViT

Format = Literal["run", "vmoe", "published", "npz", "timm", "hugging_face", "siglino"]
"""A run folder; our safetensors; published V-MoE checkpoints; ViTs of other libraries."""


class Origin(NamedTuple):
    """Where the parameters of a model come from.

    Attributes:
        format: format of the files.
        path: path passed to ``read``; a URL is text.
        weights: which parameters of a run were read.
        assumed: settings that the files do not specify, and the values they were given.
        unused: names of arrays in the files that the model does not use.
        copied_from: for a folder that vmoe wrote, the format of its parameters before the first
            copy; None for all other files.
    """

    format: Format
    path: Path | str
    weights: Weights = "raw"
    assumed: tuple[str, ...] = ()
    unused: tuple[str, ...] = ()
    copied_from: Format | None = None


class StoredModel(NamedTuple):
    """A trained model, as ``read`` returns it.

    Attributes:
        config: config of the model, as it was trained.
        params: the parameters, as nested dicts; their shapes, if no array was read.
        class_names: names of the classes, in the order of the logits.
        preprocessing: how images are prepared for the model.
        step: number of training steps; None if unknown.
        origin: where the parameters come from.
        train_config: config of the training run; None if the files do not come from a run.
        loss: the loss that the model was trained with.
    """

    config: ViTConfig
    params: dict[str, Any]
    class_names: tuple[str, ...]
    preprocessing: Preprocessing
    step: int | None
    origin: Origin
    train_config: TrainConfig | None = None
    loss: Loss = "softmax"

    def model(self) -> "ViT":
        """The model with these parameters, on the default device."""
        return models.with_params(self.config, jax.device_put(self.params))
