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
    """A whole training run: the same config gives the same parameters."""

    model: ViTConfig = ViTConfig()
    data: DataConfig = DataConfig()
    optim: OptimConfig = OptimConfig()
    steps: int = 1000
    batch_size: int = 32
    loss: Literal["softmax", "sigmoid"] = "softmax"
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
            f"optim.warmup_steps={self.optim.warmup_steps} must be less than steps={self.steps}",
        )
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
        for evaluation in self.evaluations:  # raises if the settings do not fit the model
            evaluation.model(self.model)
