"""The optimiser and its learning rate."""

import dataclasses
from typing import Literal

from vmoe.config.fields import Checked, require


@dataclasses.dataclass(frozen=True)
class WeightDecayConfig(Checked):
    """Decoupled weight decay by kind of parameter; each rate is multiplied by the learning rate."""

    section = "optim.weight_decay"

    kernels: float = 0.05
    """Rate of all kernels without a rate of their own below."""
    experts: float | None = None
    """Rate of the experts' kernels; as ``kernels`` if None."""
    routers: float | None = None
    """Rate of the routers' kernels; as ``kernels`` if None."""
    head: float | None = None
    """Rate of the head's kernels; as ``kernels`` if None."""
    others: float = 0.0
    """Rate of biases, norms, positions and the class token."""

    def __post_init__(self) -> None:
        super().__post_init__()
        for name, rate in dataclasses.asdict(self).items():
            require(rate is None or rate >= 0, f"optim.weight_decay.{name}={rate}: use 0 or more")


@dataclasses.dataclass(frozen=True)
class OptimConfig(Checked):
    """The optimiser: clipping, Adam or momentum, weight decay, learning rate, in this order."""

    section = "optim"

    kind: Literal["adamw", "sgd"] = "adamw"
    lr: float = 1e-3
    """Peak learning rate."""
    schedule: Literal["cosine", "linear", "constant"] = "cosine"
    """The learning rate after the warmup."""
    end_lr: float = 1e-5
    """Learning rate that is reached after the last step; a constant schedule stays at the peak."""
    warmup_steps: int = 100
    """Steps of linear increase from 0, the rate of the first step, to the peak."""
    b1: float = 0.9
    """Decay rate of Adam's mean of gradients."""
    b2: float = 0.999
    """Decay rate of Adam's mean of squared gradients."""
    momentum: float = 0.9
    """Momentum of SGD."""
    weight_decay: WeightDecayConfig = WeightDecayConfig()
    grad_clip_norm: float | None = 1.0
    """Largest global norm of the gradient; None for no clipping."""

    def __post_init__(self) -> None:
        super().__post_init__()
        require(self.lr > 0, f"optim.lr={self.lr}: use more than 0")
        require(self.warmup_steps >= 0, f"optim.warmup_steps={self.warmup_steps}: use 0 or more")
        require(
            self.grad_clip_norm is None or self.grad_clip_norm > 0,
            f"optim.grad_clip_norm={self.grad_clip_norm}: use more than 0, or None",
        )
        require(self.end_lr >= 0, f"optim.end_lr={self.end_lr}: use 0 or more")
        for name in ("b1", "b2", "momentum"):
            value = getattr(self, name)
            require(0 <= value < 1, f"optim.{name}={value}: a decay rate must be in [0, 1)")
