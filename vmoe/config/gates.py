"""One dataclass per gate, with its settings."""

import dataclasses
from typing import Literal

from vmoe.fields import Checked, Count, Positive


class GateConfig(Checked):
    """The interface of every gate's config.

    Attributes:
        logits_per: "expert" for logits (g, s, e); "slot" for (g, s, e, c), whose slots are
            parameters. It is equal to the router's.
        columns: names of the parameters with one column per expert (their last axis); the others
            are the same for any number of experts. Without such names, the experts of a trained
            layer cannot be pruned, added or merged.
    """

    section = "model.moe.gate"
    logits_per = "expert"
    columns = tuple[str, ...]()


@dataclasses.dataclass(frozen=True)
class LinearGate(GateConfig):
    """A linear layer without bias: the gate of V-MoE."""

    kind: Literal["linear"] = "linear"
    """The gate."""

    columns = ("kernel",)


@dataclasses.dataclass(frozen=True)
class NoisyGate(GateConfig):
    """A linear layer, whose noise has a learned standard deviation for each token and expert.

    The noise replaces the router's (Shazeer et al. 2017, arXiv 1701.06538, equation 4).
    """

    kind: Literal["noisy"] = "noisy"
    """The gate."""

    columns = ("kernel", "noise")


@dataclasses.dataclass(frozen=True)
class CosineGate(GateConfig):
    """The cosine between projected tokens and experts, over a learned temperature (X-MoE, arXiv
    2204.09179)."""

    kind: Literal["cosine"] = "cosine"
    """The gate."""
    dim: Count | None = None
    """Width of the projection; if None, half of the number of experts, at least 1."""
    temperature: Positive = 0.5
    """Initial temperature. With 0.5 and 8 experts, new logits vary about as much as a linear
    gate's."""


@dataclasses.dataclass(frozen=True)
class MlpGate(GateConfig):
    """Two linear layers with tanh between them."""

    kind: Literal["mlp"] = "mlp"
    """The gate."""
    hidden_dim: Count | None = None
    """Hidden width; if None, the width of the tokens."""

    columns = ("kernel",)


@dataclasses.dataclass(frozen=True)
class SlotGate(GateConfig):
    """Soft slots: the cosine between tokens and slots, times a learned scale (Soft MoE)."""

    kind: Literal["slots"] = "slots"
    """The gate."""

    logits_per = "slot"


Gate = LinearGate | NoisyGate | CosineGate | MlpGate | SlotGate
