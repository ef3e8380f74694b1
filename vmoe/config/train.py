"""A training run."""

import dataclasses
import math
from fractions import Fraction
from typing import Literal

from vmoe.config.data import DataConfig
from vmoe.config.evaluation import EvalConfig
from vmoe.config.fewshot import FewShotConfig
from vmoe.config.fields import LARGEST_COUNT, Checked, require, require_count
from vmoe.config.model import ViTConfig
from vmoe.config.optim import OptimConfig
from vmoe.config.preprocessing import Preprocessing
from vmoe.errors import UsageError

LENGTHS = ("steps", "epochs", "images")
"""The fields of a ``TrainConfig`` that give its length, of which a config has one."""
DEFAULT_STEPS = 1000
ANY_LENGTH = LARGEST_COUNT
"""The largest number of steps, since they are counted in 32 bits; any warmup fits. It is also the
length of a config whose own is not known or has no effect."""


Loss = Literal["softmax", "sigmoid"]


@dataclasses.dataclass(frozen=True)
class TrainConfig(Checked):
    """A whole training run: the same config gives the same parameters."""

    model: ViTConfig = ViTConfig()
    data: DataConfig = DataConfig()
    optim: OptimConfig = OptimConfig()
    steps: int | None = None
    """Length of the run in steps; 1000 if none of ``steps``, ``epochs`` and ``images`` is given."""
    epochs: float | None = None
    """Length as passes over the training images, in place of ``steps``; rounded up to a step."""
    images: int | None = None
    """Length as training images, repeated ones included, in place of ``steps``; rounded up."""
    batch_size: int = 32
    """Images per step, over all devices."""
    accumulate: int = 1
    """Number of equal parts of a batch, computed one after another to save memory; their gradients
    are averaged. Groups are formed within a part, and each part has noise of its own; where groups
    are the same and nothing is random, the update is that of the whole batch."""
    loss: Loss = "softmax"
    """Cross-entropy of the softmax over classes, or of a sigmoid per class, summed over classes."""
    label_smoothing: float = 0.0
    """Fraction of each label's probability spread evenly over all classes, in [0, 1)."""
    ema_decay: float = 0.0
    """Decay of the moving average of the parameters (EMA), which is evaluated too; 0 for no EMA. At
    step t the decay is at most (1 + t) / (10 + t), so that the initial values fade quickly."""
    seed: int = 0
    """Determines initialisation, data order, augmentation, router noise and dropout."""
    evaluations: tuple[EvalConfig, ...] = (EvalConfig(),)
    """Evaluation sets; the accuracy on the first one decides which checkpoint is the best."""
    fewshot: FewShotConfig = FewShotConfig()
    """Few-shot probes during training, of the moving average if there is one."""
    log_every: int = 50
    """Steps between rows of metrics."""
    evaluate_every: int = 500
    """Steps between evaluations; the last step is always evaluated."""
    checkpoint_every: int = 500
    """Steps between checkpoints; the last step is always saved."""
    keep_latest: int = 2
    """Number of newest scheduled checkpoints to keep; the best one by evaluation and the last one
    are kept too."""

    def __post_init__(self) -> None:
        super().__post_init__()
        self._check_length()
        require(0 <= self.seed < 2**32, f"seed={self.seed}: use 0 to 4294967295")
        counts = (
            "batch_size",
            "accumulate",
            "log_every",
            "evaluate_every",
            "checkpoint_every",
            "keep_latest",
        )
        for name in counts:
            require_count(name, getattr(self, name))
        parts = ["head", "others", *(["routers", "experts"] if self.model.sparse_blocks else [])]
        require(
            any(getattr(self.optim.lr_factors, part) for part in parts),
            f"optim.lr_factors: {', '.join(parts)} are all 0, so there is nothing to train",
        )
        require(
            not self.optim.expert_averaging
            or bool(self.model.sparse_blocks and self.optim.lr_factors.experts),
            f"optim.expert_averaging={self.optim.expert_averaging}: no experts are trained; use 0",
        )
        require(
            0 <= self.label_smoothing < 1,
            f"label_smoothing={self.label_smoothing}: it must be in [0, 1)",
        )
        require(0 <= self.ema_decay < 1, f"ema_decay={self.ema_decay}: it must be in [0, 1)")
        for name in ("shift", "cutout"):
            value, size = getattr(self.data, name), self.model.image_size
            require(
                value < size,
                f"data.{name}={value} must be less than model.image_size={size}",
            )
        names = [evaluation.name for evaluation in self.evaluations]
        require(bool(names), "evaluations: give at least one evaluation set")
        require(len(names) == len(set(names)), f"evaluations: the names {names} are not unique")
        exif = self.data.preprocessing.exif
        for evaluation in self.evaluations:
            evaluation.model(self.model)  # raises if the settings do not fit the model
            own = evaluation.prepare(self.data, self.model).exif
            require(
                own == exif,
                f"evaluations, set {evaluation.name!r}: preprocessing.exif={own}, but "
                f"data.preprocessing.exif={exif}: give both the same value",
            )

    def _check_length(self) -> None:
        given = {name: getattr(self, name) for name in LENGTHS if getattr(self, name) is not None}
        values = " and ".join(f"{name}={value}" for name, value in given.items())
        require(len(given) <= 1, f"{values}: a run has one length; set the others to None")
        for name, value in given.items():
            least = "more than 0" if name == "epochs" else "at least 1"
            require(value > 0, f"{name}={value}: use {least}")
        if not self.has_steps:
            return
        steps, warmup, cooldown = (
            self.total_steps,
            self.optim.warmup_steps,
            self.optim.cooldown_steps,
        )
        require_count("steps", steps)
        require(warmup < steps, f"optim.warmup_steps={warmup} must be less than steps={steps}")
        require(
            warmup + cooldown <= steps,
            f"optim.warmup_steps={warmup} and optim.cooldown_steps={cooldown} must not be more "
            f"than steps={steps} together",
        )

    @property
    def has_steps(self) -> bool:
        """Whether the length in steps is known without the training data."""
        return self.epochs is None and self.images is None

    @property
    def preprocessing(self) -> Preprocessing:
        """How images are prepared for the trained model: as for the first evaluation set, in the
        size that the model is trained with."""
        first = self.evaluations[0].prepare(self.data, self.model)
        return first.scaled(self.model.image_size)

    @property
    def total_steps(self) -> int:
        """The number of steps.

        Raises:
            UsageError: it depends on the training data; see ``with_steps``.
        """
        if not self.has_steps:
            raise UsageError(
                f"epochs={self.epochs}, images={self.images}: give the length in steps, or resolve "
                "it with TrainConfig.with_steps"
            )
        return DEFAULT_STEPS if self.steps is None else self.steps

    def with_steps(self, images_in_source: int) -> "TrainConfig":
        """The config with its length in steps, rounded up.

        Args:
            images_in_source: number of images that an epoch visits.

        Raises:
            UsageError: warmup and cooldown do not fit into the steps, or there are too many.

        >>> config = TrainConfig(epochs=2.2, batch_size=4, optim=OptimConfig(warmup_steps=1))
        >>> config.with_steps(10).steps
        6
        """
        if self.has_steps:
            return dataclasses.replace(self, steps=self.total_steps)
        name, images = "images", self.images
        if images is None:  # in exact numbers; in floating point 0.07 * 100 is more than 7
            name, images = "epochs", Fraction(str(self.epochs)) * images_in_source
        steps = math.ceil(Fraction(images, self.batch_size))
        require(
            steps <= ANY_LENGTH,
            f"{name}={getattr(self, name)} is {steps} steps: a run has at most {ANY_LENGTH}",
        )
        return dataclasses.replace(self, steps=steps, epochs=None, images=None)
