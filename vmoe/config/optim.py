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
    """Rate of all else: biases, norms, positions, the class token, scales and probes."""

    def __post_init__(self) -> None:
        super().__post_init__()
        for name, rate in dataclasses.asdict(self).items():
            require(rate is None or rate >= 0, f"optim.weight_decay.{name}={rate}: use 0 or more")


@dataclasses.dataclass(frozen=True)
class LrFactorsConfig(Checked):
    """Factors of the learning rate by part of the model; 0 freezes a part.

    Linear probing trains only the head: it sets all other factors to 0.
    """

    section = "optim.lr_factors"

    head: float = 1.0
    """Factor of the head, pre-logits included."""
    routers: float = 1.0
    """Factor of the routers."""
    experts: float = 1.0
    """Factor of the experts."""
    others: float = 1.0
    """Factor of all else: embeddings, attention, dense MLPs, norms, the attention pool."""

    def __post_init__(self) -> None:
        super().__post_init__()
        for name, factor in dataclasses.asdict(self).items():
            require(factor >= 0, f"optim.lr_factors.{name}={factor}: use 0 or more")


@dataclasses.dataclass(frozen=True)
class OptimConfig(Checked):
    """The optimiser: clipping, Adam or momentum, weight decay, learning rate, in this order.

    ``lr_factors`` and ``layer_decay`` multiply the learning rate, and so the weight decay too.
    """

    section = "optim"

    kind: Literal["adamw", "sgd"] = "adamw"
    """AdamW, or SGD with momentum."""
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
    """Largest global norm of the gradient of what is trained; None for no clipping."""
    lr_factors: LrFactorsConfig = LrFactorsConfig()
    layer_decay: float = 1.0
    """Layer-wise decay of the learning rate, as in BEiT and MAE: a parameter with n layers above
    its own has layer_decay ** n times the rate. The last norm, the attention pool and the head have
    n = 0, the last block n = 1, the first block n = depth, the embeddings n = depth + 1."""
    expert_averaging: float = 0.0
    """After every update each expert becomes (1 - expert_averaging) times itself plus
    expert_averaging times the mean of the other experts of its block (arXiv 2308.06093), so that
    they can be averaged into a dense MLP after training. In [0, 1]."""

    def __post_init__(self) -> None:
        super().__post_init__()
        require(self.lr > 0, f"optim.lr={self.lr}: use more than 0")
        require(self.warmup_steps >= 0, f"optim.warmup_steps={self.warmup_steps}: use 0 or more")
        require(
            self.grad_clip_norm is None or self.grad_clip_norm > 0,
            f"optim.grad_clip_norm={self.grad_clip_norm}: use more than 0, or None",
        )
        require(self.end_lr >= 0, f"optim.end_lr={self.end_lr}: use 0 or more")
        require(
            0 < self.layer_decay <= 1, f"optim.layer_decay={self.layer_decay}: it must be in (0, 1]"
        )
        require(
            0 <= self.expert_averaging <= 1,
            f"optim.expert_averaging={self.expert_averaging}: it must be in [0, 1]",
        )
        for name in ("b1", "b2", "momentum"):
            value = getattr(self, name)
            require(0 <= value < 1, f"optim.{name}={value}: a decay rate must be in [0, 1)")
