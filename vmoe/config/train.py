"""A training run."""

import dataclasses
import math
from fractions import Fraction
from typing import Annotated, Literal

from vmoe.config.data import DataConfig
from vmoe.config.evaluation import EvalConfig
from vmoe.config.fewshot import FewShotConfig
from vmoe.config.model import ViTConfig
from vmoe.config.optim import OptimConfig
from vmoe.config.preprocessing import Preprocessing
from vmoe.errors import require
from vmoe.fields import (
    LARGEST_COUNT,
    NOT_EMPTY,
    Checked,
    Count,
    Positive,
    Rate,
    Seed,
    at_least,
)

LENGTHS = ("steps", "epochs", "images")
"""The fields of a ``TrainConfig`` for its length; a config sets one of them."""
DEFAULT_STEPS = 1000
ANY_LENGTH = LARGEST_COUNT
"""The largest number of steps, since they are counted in 32 bits; any warmup fits. It also stands
for a length that is not known, or that has no effect."""


Loss = Literal["softmax", "sigmoid"]


@dataclasses.dataclass(frozen=True)
class TrainConfig(Checked):
    """A whole training run: the same config gives the same parameters."""

    model: ViTConfig = ViTConfig()
    data: DataConfig = DataConfig()
    optim: OptimConfig = OptimConfig()
    steps: Count | None = None
    """Length of the run in steps; 1000 if none of ``steps``, ``epochs`` and ``images`` is given."""
    epochs: Positive | None = None
    """Length as passes over the training images, instead of ``steps``; rounded up to a step."""
    images: Annotated[int, at_least(1)] | None = None
    """Length as training images, with repetitions, instead of ``steps``; rounded up to a step."""
    batch_size: Count = 32
    """Images per step, over all devices."""
    accumulate: Count = 1
    """Number of equal parts of a batch, which are computed one after another to save memory; their
    gradients are averaged. Groups are formed and noise is drawn for each part. Without noise, and
    if no group spans parts, the update equals the update of the whole batch."""
    loss: Loss = "softmax"
    """softmax: cross-entropy over classes; sigmoid: binary cross-entropy, summed over classes."""
    label_smoothing: Rate = 0.0
    """Fraction of the probability of each label that is spread evenly over all classes, in [0,
    1)."""
    ema_decay: Rate = 0.0
    """Decay of the moving average of the parameters (EMA), which is evaluated too; 0 for no EMA. At
    step t the decay is at most (1 + t) / (10 + t), so initial values fade quickly."""
    seed: Seed = 0
    """Seed of the initialization, data order, augmentation, router noise and dropout."""
    evaluations: Annotated[tuple[EvalConfig, ...], NOT_EMPTY] = (EvalConfig(),)
    """Evaluation sets; the accuracy on the first one decides which checkpoint is the best."""
    fewshot: FewShotConfig = FewShotConfig()
    """Few-shot probes during training, of the moving average if there is one."""
    log_every: Count = 50
    """Steps between rows of metrics."""
    evaluate_every: Count = 500
    """Steps between evaluations; the last step is always evaluated."""
    checkpoint_every: Count = 500
    """Steps between checkpoints; the last step is always saved."""
    keep_latest: Count = 2
    """Number of newest scheduled checkpoints to keep. The checkpoint of the best evaluation and the
    last one are kept too."""

    def __post_init__(self) -> None:
        super().__post_init__()
        self._check_length()
        parts = ["head", "others", *(["routers", "experts"] if self.model.sparse_blocks else [])]
        if self.optim.lr_factors.shared_experts is not None:
            parts.append("shared_experts")
            self.require(
                any(moe.shared_experts for moe in self.model.moe_blocks.values()),
                "the model has no shared experts, leave it out",
                "optim.lr_factors.shared_experts",
            )
        self.require(
            any(getattr(self.optim.lr_factors, part) for part in parts),
            f"{', '.join(parts)} are all 0, so there is nothing to train",
            "optim.lr_factors",
        )
        self.require(
            not self.optim.expert_averaging
            or bool(self.model.sparse_blocks and self.optim.lr_factors.experts),
            "no experts are trained; use 0",
            "optim.expert_averaging",
        )
        slots = (
            "these experts send slots: only MLPs without a capacity, or with another "
            "implementation than batched, send rows; leave it out"
        )
        for moe in self.model.moe_blocks.values():
            for name in ("buffer_factor", "hot_experts", "ragged"):
                given = getattr(moe.exchange, name)
                moe.require(moe.sends_rows or not given, slots, f"exchange.{name}")
        for name in ("shift", "cutout"):
            fits = getattr(self.data, name) < self.model.image_size
            self.require(fits, "use less than the image size", f"data.{name}", "model.image_size")
        names = [evaluation.name for evaluation in self.evaluations]
        self.require(
            len(names) == len(set(names)), f"the names {names} are not unique", "evaluations"
        )
        exif = self.data.preprocessing.exif
        for evaluation in self.evaluations:
            evaluation.model(self.model)  # raises if the settings do not fit the model
            own = evaluation.prepare(self.data, self.model).exif
            fields = {"evaluations.preprocessing.exif": own, "data.preprocessing.exif": exif}
            require(own == exif, f"set {evaluation.name!r}: give both the same value", **fields)

    def _check_length(self) -> None:
        given = {name: getattr(self, name) for name in LENGTHS if getattr(self, name) is not None}
        require(len(given) <= 1, "a run has one length; set the others to None", **given)
        if not self.has_steps:
            return
        steps, optim = self.total_steps, self.optim
        fields = {"optim.warmup_steps": optim.warmup_steps, "steps": steps}
        remedy = f"use optim.warmup_steps of at most {steps - 1}, or more steps"
        require(optim.warmup_steps < steps, remedy, **fields)
        fields = {"optim.cooldown_steps": optim.cooldown_steps, **fields}
        both = optim.warmup_steps + optim.cooldown_steps
        require(both <= steps, "use a shorter cooldown or warmup", **fields)

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
        self.require(
            self.has_steps,
            "give the length in steps, or resolve it with TrainConfig.with_steps",
            "epochs" if self.images is None else "images",
        )
        return DEFAULT_STEPS if self.steps is None else self.steps

    def with_steps(self, images_in_source: int) -> "TrainConfig":
        """The config with its length in steps, rounded up.

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
        self.require(
            steps <= ANY_LENGTH, f"these are {steps} steps; a run has at most {ANY_LENGTH}", name
        )
        return dataclasses.replace(self, steps=steps, epochs=None, images=None)
