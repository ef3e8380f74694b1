"""A training run."""

import dataclasses
from typing import Literal

from vmoe.config.data import DataConfig
from vmoe.config.evaluation import EvalConfig
from vmoe.config.fields import Checked, require
from vmoe.config.model import ViTConfig
from vmoe.config.optim import OptimConfig


@dataclasses.dataclass(frozen=True)
class TrainConfig(Checked):
    """A training run, whole: the same TrainConfig gives the same parameters."""

    model: ViTConfig = ViTConfig()
    data: DataConfig = DataConfig()
    optim: OptimConfig = OptimConfig()
    steps: int = 1000
    batch_size: int = 32
    loss: Literal["softmax", "sigmoid"] = "softmax"
    """Cross-entropy: of one class among all, or of each class by itself, summed over classes."""
    label_smoothing: float = 0.0
    """Share of each label that is spread over all classes."""
    ema_decay: float = 0.0
    """Decay of a moving average of the parameters, evaluated beside them; 0 for none. Over step t
    it is at most (1 + t) / (10 + t), so that the start is soon forgotten."""
    seed: int = 0
    """Decides initialisation, order of the data, augmentation, noise and dropout."""
    evaluations: tuple[EvalConfig, ...] = (EvalConfig(),)
    """What the model is evaluated on; the accuracy on the first decides which step is best."""
    log_every: int = 50
    """Steps between rows of metrics."""
    evaluate_every: int = 500
    """Steps between evaluations; the last step is always evaluated."""
    checkpoint_every: int = 500
    """Steps between checkpoints; the last step is always saved."""
    keep_latest: int = 2
    """How many of the checkpoints due are kept, the newest; beside them the best of those
    evaluated, and the last one."""

    def __post_init__(self) -> None:
        super().__post_init__()
        require(0 <= self.seed < 2**32, f"seed={self.seed}: use 0 to 4294967295")
        counts = (
            "steps",
            "batch_size",
            "log_every",
            "evaluate_every",
            "checkpoint_every",
            "keep_latest",
        )
        for name in counts:
            require(getattr(self, name) >= 1, f"{name}={getattr(self, name)}: use at least 1")
        require(
            self.optim.warmup_steps < self.steps,
            f"optim.warmup_steps={self.optim.warmup_steps} leaves no step of steps={self.steps}",
        )
        require(
            0 <= self.label_smoothing < 1,
            f"label_smoothing={self.label_smoothing}: a share in [0, 1)",
        )
        require(0 <= self.ema_decay < 1, f"ema_decay={self.ema_decay}: a decay rate lies in [0, 1)")
        for name in ("shift", "cutout"):
            value, size = getattr(self.data, name), self.model.image_size
            require(
                value < size,
                f"data.{name}={value} leaves nothing of an image of model.image_size={size}",
            )
        names = [evaluation.name for evaluation in self.evaluations]
        require(bool(names), "evaluations: name at least one set")
        require(len(names) == len(set(names)), f"evaluations: two have one name in {names}")
        for evaluation in self.evaluations:  # what cannot work together is refused here
            evaluation.model(self.model)
