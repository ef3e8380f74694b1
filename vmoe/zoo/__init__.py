"""Trained weights by name, in timm's way: the name of a model, a dot, and a tag.

``vmoe_s32_last2_e8.in1k_light`` names weights for the model ``vmoe_s32_last2_e8``. The name without
a tag means the first entry of the model. The weights for Fashion-MNIST and emoji are in folders
next to this file, each with its model card (``scripts/maintain/zoo.py``). A published checkpoint is
downloaded when it is first used. Its accuracies were published by its authors and not measured
again; its config has the capacity factor at which the authors measured them.
"""

import math
from collections.abc import Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any, NamedTuple

from vmoe import models
from vmoe.config import ViTConfig
from vmoe.config.train import Loss
from vmoe.errors import UsageError, unknown

FILES = (".npz", ".safetensors", ".json", ".index")  # suffixes of paths, which are not tags
PACKAGED = Path(__file__).parent
MEASURED = "measured.json"  # beside packaged weights: accuracies, and logits of some images
BUCKET = "gs://vmoe_checkpoints"


class Entry(NamedTuple):
    """Trained weights.

    Attributes:
        model: name of the model.
        tag: short name of the training data and the training.
        path: of a folder, or a URL; ``vmoe.load`` opens it.
        fields: fields of the config that differ from the config of that name.
        training: how the weights were trained.
        accuracies: accuracy in percent, by data set.
        measured_by: who or which script measured the accuracies.
        capacity_source: why the config has its capacity factor.
        loss: training loss; the authors fine-tune with the softmax.
    """

    model: str
    tag: str
    path: str
    fields: Mapping[str, Any]
    training: str
    accuracies: Mapping[str, float]
    measured_by: str = "the authors"
    capacity_source: str = "as in training"
    loss: Loss = "softmax"

    @property
    def name(self) -> str:
        """The model and the tag."""
        return f"{self.model}.{self.tag}"

    @property
    def config(self) -> ViTConfig:
        """The config of the model."""
        return models.model_config(self.model, **self.fields)

    @property
    def capacity_factor(self) -> float | None:
        """The capacity factor of the sparse blocks; None for a dense model."""
        return next((moe.router.capacity_factor for moe in self.config.moe_blocks.values()), None)

    @property
    def nbytes(self) -> int:
        """The size of the parameters in bytes, computed from their shapes."""
        return sum(
            math.prod(leaf.shape) * 4 for leaf in models.abstract_params(self.config).values()
        )


_NOT_MEASURED: Mapping[str, float] = MappingProxyType({})
_BEST_OF_3 = "{}, the best of three seeds on the validation split"
_FASHION_MNIST = _BEST_OF_3.format("Fashion-MNIST, 8,000 steps")
_OURS = "scripts/maintain/zoo.py"
ENTRIES = (
    Entry(
        "vmoe_fashion_mnist",
        "best_of_3",
        str(PACKAGED / "vmoe_fashion_mnist"),
        {},
        _FASHION_MNIST,
        {"Fashion-MNIST": 90.15, "fashion_mnist_sample": 92.19},
        _OURS,
    ),
    Entry(
        "vit_fashion_mnist",
        "best_of_3",
        str(PACKAGED / "vit_fashion_mnist"),
        {},
        _FASHION_MNIST,
        {"Fashion-MNIST": 89.54, "fashion_mnist_sample": 91.21},
        _OURS,
    ),
    Entry(
        "vmoe_emoji",
        "best_of_3",
        str(PACKAGED / "vmoe_emoji"),
        {},
        _BEST_OF_3.format("emoji of two vendors, 3,000 steps"),
        {"emoji": 63.54, "emoji_sample": 64.84},
        _OURS,
    ),
    Entry(
        "vmoe_s32_last2_e8",
        "in1k_light",
        f"{BUCKET}/vmoe_s32_last2_ilsvrc2012_randaug_light1",
        {"moe": {"router": {"capacity_factor": 4.0}}},
        "ImageNet-1k from scratch, 300 epochs, light augmentation",
        {"ImageNet": 73.1, "ReaL": 74.4, "V2": 59.2},
        capacity_source="as in the authors' evaluation",
        loss="sigmoid",
    ),
    Entry(
        "vmoe_s32_last2_e8",
        "in1k_light_ft_in1k_384",
        f"{BUCKET}/vmoe_s32_last2_ilsvrc2012_randaug_light1_ft_ilsvrc2012",
        {"image_size": 384, "pre_logits": None, "moe": {"router": {"capacity_factor": 1.5}}},
        "in1k_light, fine-tuned on ImageNet-1k at 384 px",
        {"ImageNet": 75.9, "ReaL": 77.1, "V2": 62.0},
    ),
    Entry(
        "vmoe_s32_last2_e8",
        "in1k_medium",
        f"{BUCKET}/vmoe_s32_last2_ilsvrc2012_randaug_medium",
        {"moe": {"router": {"capacity_factor": 4.0}}},
        "ImageNet-1k from scratch, 1,000 epochs, medium augmentation",
        _NOT_MEASURED,
        capacity_source="as for in1k_light, because the config of in1k_medium is not public",
        loss="sigmoid",
    ),
    Entry(
        "vmoe_b16_every2_e8",
        "in21k_strong",
        f"{BUCKET}/vmoe_b16_imagenet21k_randaug_strong",
        {"num_classes": 21_843},
        "ImageNet-21k from scratch, 300 epochs, strong augmentation",
        _NOT_MEASURED,
        loss="sigmoid",
    ),
    Entry(
        "vmoe_b16_every2_e8",
        "in21k_strong_ft_in1k_384",
        f"{BUCKET}/vmoe_b16_imagenet21k_randaug_strong_ft_ilsvrc2012",
        {"image_size": 384, "moe": {"router": {"capacity_factor": 1.5}}},
        "in21k_strong, fine-tuned on ImageNet-1k at 384 px",
        {"ImageNet": 85.6, "ReaL": 84.1, "V2": 76.1},
    ),
)


def find(name: str) -> Entry | None:
    """The entry of a name with or without a tag; None if it is not the name of a model.

    Raises:
        UsageError: the model has no such tag, or no trained weights at all.

    >>> find("vmoe_s32_last2_e8").tag
    'in1k_light'
    """
    model, _, tag = name.partition(".")
    if model not in models.MODELS:
        return None
    own = [entry for entry in ENTRIES if entry.model == model]
    if not own:
        known = list(dict.fromkeys(entry.model for entry in ENTRIES))
        raise UsageError(unknown("no trained weights for model", model, known))
    if not tag:
        return own[0]
    tags = {entry.tag: entry for entry in own}
    if tag not in tags:
        raise UsageError(unknown(f"{model} has no weights with tag", tag, list(tags)))
    return tags[tag]


def published(prefix: str) -> Entry | None:
    """The entry of a published checkpoint by the name of its files; None if there is none.

    >>> published("vmoe_s32_last2_ilsvrc2012_randaug_medium").tag
    'in1k_medium'
    """
    paths = {entry.path: entry for entry in ENTRIES}
    return paths.get(f"{BUCKET}/{prefix}")


def resolve(path: str) -> str:
    """The path or URL of trained weights by name; see ``find``. Any other path is unchanged."""
    if Path(path).exists() or path.endswith(FILES):
        return path
    entry = find(path)
    return path if entry is None else entry.path
