"""The optimizer and its learning rate."""

import dataclasses
from typing import Annotated, Literal

from vmoe.fields import (
    Checked,
    Count,
    NonNegative,
    Positive,
    Rate,
    at_least,
    at_most,
    more_than,
)

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
"""Fields of ``OptimConfig`` that only some kinds of optimizer, or some schedules, use; with others
they must keep their defaults. ``end_lr`` is not among them: most configs set it, and an option may
then choose a constant schedule."""


@dataclasses.dataclass(frozen=True)
class WeightDecayConfig(Checked):
    """Decoupled weight decay by kind of parameter; each rate is multiplied by the learning rate."""

    section = "optim.weight_decay"

    kernels: NonNegative = 0.05
    """Rate of all kernels that have no other rate."""
    experts: NonNegative | None = None
    """Rate of the kernels of experts, shared ones too; if None, ``kernels``."""
    routers: NonNegative | None = None
    """Rate of the kernels of routers; if None, ``kernels``."""
    head: NonNegative | None = None
    """Rate of the kernels of the head; if None, ``kernels``."""
    others: NonNegative = 0.0
    """Rate of all other parameters: biases, norms, positions, the class token, registers, scales,
    probes, and the arrays of a gate besides its kernel (of a cosine, MLP or noisy one)."""


@dataclasses.dataclass(frozen=True)
class LrFactorsConfig(Checked):
    """Factors of the learning rate by part of the model; 0 freezes a part.

    Linear probing trains only the head: it sets all other factors to 0.
    """

    section = "optim.lr_factors"

    head: NonNegative = 1.0
    """Factor of the head, pre-logits included."""
    routers: NonNegative = 1.0
    """Factor of the routers."""
    experts: NonNegative = 1.0
    """Factor of the experts."""
    others: NonNegative = 1.0
    """Factor of all other parts: embeddings, attention, dense MLPs, norms, the attention pool."""
    shared_experts: NonNegative | None = None
    """Factor of the shared experts; if None, that of the experts. 0 freezes the MLP that
    `vmoe upcycle --start low_rank` makes a shared expert."""


@dataclasses.dataclass(frozen=True)
class OptimConfig(Checked):
    """The optimizer: clipping, scaling by ``kind``, weight decay, learning rate, in this order.

    ``lr_factors`` and ``layer_decay`` multiply the learning rate, and so the weight decay too. A
    field that the chosen kind or schedule does not use must keep its default.
    """

    section = "optim"

    kind: Literal["adamw", "sgd", "adafactor", "lion"] = "adamw"
    """AdamW; SGD with momentum; Adafactor as in "Scaling Vision Transformers" (arXiv 2106.04560,
    section 3.4), which V-MoE uses: without scaling by the size of parameters and without clipping
    of updates; Lion (arXiv 2302.06675)."""
    lr: Positive = 1e-3
    """Peak learning rate."""
    schedule: Literal["cosine", "linear", "constant", "polynomial", "rsqrt"] = "cosine"
    """The learning rate after the warmup. cosine, linear, polynomial: it decays to ``end_lr`` after
    the last step, along a cosine, a line, or a line to the ``power``; constant: the peak; rsqrt:
    lr / sqrt(1 + (step - warmup_steps) / timescale)."""
    end_lr: NonNegative = 1e-5
    """Learning rate that is reached after the last step (cosine, linear, polynomial); at most
    ``lr``."""
    warmup_steps: Annotated[int, at_least(0)] = 100
    """Steps of linear increase from 0, the rate of the first step, to the peak."""
    power: Positive = 2.0
    """Exponent of the polynomial schedule; 1 is the linear schedule."""
    timescale: Count = 10_000
    """Steps after the warmup at which the rsqrt schedule has fallen to lr / sqrt(2)."""
    cooldown_steps: Annotated[int, at_least(0)] = 0
    """Number of last steps of a constant or rsqrt schedule in which the rate falls linearly to
    0."""
    b1: Rate = 0.9
    """Decay rate of the mean of gradients (AdamW); weight of the momentum in an update (Lion)."""
    b2: Rate | None = None
    """Decay rate of the mean of squared gradients (AdamW, 0.999 if None); the largest decay rate of
    the factored means of squared gradients, which is 1 - step ** -0.8 (Adafactor, 0.999 if None);
    decay rate of the momentum (Lion, 0.99 if None)."""
    momentum: Rate = 0.9
    """SGD adds the gradient to ``momentum`` times the last update; Adafactor averages its updates
    with this decay rate, without bias correction."""
    momentum_dtype: Literal["float32", "bfloat16"] = "float32"
    """Data type in which the momentum is stored: the mean of gradients of AdamW, the trace of SGD,
    the mean of updates of Adafactor, the momentum of Lion. bfloat16 takes half the memory."""
    min_dim_size_to_factor: Count = 32
    """Adafactor stores means over rows and columns, instead of the square of every element, for
    arrays whose two largest axes have at least this size. Set it above the number of experts to
    keep the expert axis unfactored."""
    weight_decay: WeightDecayConfig = WeightDecayConfig()
    grad_clip_norm: Positive | None = 1.0
    """Largest global norm of the gradient of the trained parameters; None for no clipping."""
    lr_factors: LrFactorsConfig = LrFactorsConfig()
    layer_decay: Annotated[float, more_than(0), at_most(1)] = 1.0
    """Layer-wise decay of the learning rate, as in BEiT and MAE: a parameter with n layers above
    its own has layer_decay ** n times the rate. The last norm, the attention pool and the head have
    n = 0, the last block n = 1, the first block n = depth, the embeddings n = depth + 1."""
    expert_averaging: Annotated[float, at_least(0), at_most(1)] = 0.0
    """After every update each expert becomes (1 - expert_averaging) times itself plus
    expert_averaging times the mean of the other experts of its block (arXiv 2308.06093). The
    experts can then be averaged into a dense MLP after training. In [0, 1]."""

    def __post_init__(self) -> None:
        super().__post_init__()
        defaults = {field.name: field.default for field in dataclasses.fields(self)}
        for choice, fields in USED_BY.items():
            for name, users in fields.items():
                self.require(
                    getattr(self, choice) in users or getattr(self, name) == defaults[name],
                    f"it has no effect, only with {' or '.join(users)}; leave it at "
                    f"{defaults[name]}",
                    name,
                    choice,
                )

    def check_decay(self) -> None:
        """Checks that the learning rate does not rise after the warmup.

        Only new runs need this: older ones may have such a config.
        """
        self.require(
            self.schedule in ("constant", "rsqrt") or self.end_lr <= self.lr,
            "the learning rate would rise after the warmup; lower its end, to 0 for instance",
            "end_lr",
            "lr",
        )
