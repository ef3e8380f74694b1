"""The optimiser and its learning rate."""

import dataclasses
from typing import Literal

from vmoe.config.fields import Checked, require, require_count

USED_BY: dict[str, dict[str, tuple[str, ...]]] = {
    "kind": {
        "b1": ("adamw", "lion"),
        "b2": ("adamw", "adafactor", "lion"),
        "momentum": ("sgd", "adafactor"),
        "min_dim_size_to_factor": ("adafactor",),
    },
    "schedule": {
        "power": ("polynomial",),
        "timescale": ("rsqrt",),
        "cooldown_steps": ("constant", "rsqrt"),
    },
}
"""The fields of ``OptimConfig`` that only some kinds of optimiser, or some schedules, use, and that
are refused with others. ``end_lr`` is not: most recipes set it, and an option may then choose a
constant schedule."""


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
    """The optimiser: clipping, scaling by ``kind``, weight decay, learning rate, in this order.

    ``lr_factors`` and ``layer_decay`` multiply the learning rate, and so the weight decay too. A
    field that the chosen kind or schedule does not use must keep its default.
    """

    section = "optim"

    kind: Literal["adamw", "sgd", "adafactor", "lion"] = "adamw"
    """AdamW; SGD with momentum; Adafactor as in "Scaling Vision Transformers" (arXiv 2106.04560,
    section 3.4), which V-MoE uses: without scaling by the size of parameters and without clipping
    of updates; Lion (arXiv 2302.06675)."""
    lr: float = 1e-3
    """Peak learning rate."""
    schedule: Literal["cosine", "linear", "constant", "polynomial", "rsqrt"] = "cosine"
    """The learning rate after the warmup: decay to ``end_lr`` after the last step along a cosine, a
    line, or the ``power`` of a line; the peak; or the reciprocal square root, which is
    lr / sqrt(1 + (step - warmup_steps) / timescale)."""
    end_lr: float = 1e-5
    """Learning rate that is reached after the last step (cosine, linear, polynomial); at most
    ``lr``."""
    warmup_steps: int = 100
    """Steps of linear increase from 0, the rate of the first step, to the peak."""
    power: float = 2.0
    """Exponent of the polynomial schedule; with 1 it is the linear one."""
    timescale: int = 10_000
    """Steps after the warmup at which the rsqrt schedule has fallen to lr / sqrt(2)."""
    cooldown_steps: int = 0
    """The last steps of a constant or rsqrt schedule, in which its rate falls linearly to 0."""
    b1: float = 0.9
    """Decay rate of the mean of gradients (AdamW); weight of the momentum in an update (Lion)."""
    b2: float | None = None
    """Decay rate of the mean of squared gradients (AdamW, 0.999 if None); the largest decay rate of
    the factored means of squared gradients, which is 1 - step ** -0.8 (Adafactor, 0.999 if None);
    decay rate of the momentum (Lion, 0.99 if None)."""
    momentum: float = 0.9
    """SGD adds the gradient to ``momentum`` times the last update; Adafactor averages its updates
    with this decay rate, without bias correction."""
    momentum_dtype: Literal["float32", "bfloat16"] = "float32"
    """In which the momentum is stored: Adam's mean of gradients, the trace of SGD, the mean of
    Adafactor's updates, Lion's momentum. With bfloat16 it takes half the memory."""
    min_dim_size_to_factor: int = 32
    """Adafactor stores means over rows and over columns, in place of every element's square, for
    arrays whose two largest axes have at least this size. If it is more than the number of experts,
    no mean is over experts."""
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
        for name in ("lr", "power"):
            require(getattr(self, name) > 0, f"optim.{name}={getattr(self, name)}: use more than 0")
        for name in ("timescale", "min_dim_size_to_factor"):
            require_count(f"optim.{name}", getattr(self, name))
        for name in ("end_lr", "warmup_steps", "cooldown_steps"):
            require(getattr(self, name) >= 0, f"optim.{name}={getattr(self, name)}: use 0 or more")
        require(
            self.grad_clip_norm is None or self.grad_clip_norm > 0,
            f"optim.grad_clip_norm={self.grad_clip_norm}: use more than 0, or None",
        )
        require(
            0 < self.layer_decay <= 1, f"optim.layer_decay={self.layer_decay}: it must be in (0, 1]"
        )
        require(
            0 <= self.expert_averaging <= 1,
            f"optim.expert_averaging={self.expert_averaging}: it must be in [0, 1]",
        )
        for name in ("b1", "b2", "momentum"):
            value = getattr(self, name)
            require(
                value is None or 0 <= value < 1,
                f"optim.{name}={value}: a decay rate must be in [0, 1)",
            )
        self._require_used()

    def check_decay(self) -> None:
        """Checks that the learning rate does not rise after the warmup.

        Only new runs need this: older ones may have such a config.

        Raises:
            UsageError: the schedule ends above the peak.
        """
        require(
            self.schedule in ("constant", "rsqrt") or self.end_lr <= self.lr,
            f"optim.end_lr={self.end_lr} is more than optim.lr={self.lr}, so the learning rate "
            "would rise after the warmup: lower optim.end_lr, to 0 for instance",
        )

    def _require_used(self) -> None:
        """Raises a UsageError if a field that is not at its default has no effect."""
        defaults = {field.name: field.default for field in dataclasses.fields(self)}
        for choice, fields in USED_BY.items():
            chosen = getattr(self, choice)
            for name, users in fields.items():
                value, default = getattr(self, name), defaults[name]
                require(
                    chosen in users or value == default,
                    f"optim.{name}={value} has no effect with optim.{choice}={chosen}, only with "
                    f"{' or '.join(users)}: leave it at {default}",
                )
