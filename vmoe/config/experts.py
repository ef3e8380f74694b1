"""One dataclass per kind of expert, with its settings."""

import dataclasses
from typing import Annotated, Any, Literal

from vmoe.fields import NOT_EMPTY, Checked, Count, at_least

Activation = Literal["tanh", "erf", "quick", "relu", "silu"]
"""The activation of an MLP. tanh, erf, quick: GELU(x) by the tanh approximation, exactly (erf), or
as x * sigmoid(1.702 x); relu: max(x, 0); silu: x * sigmoid(x)."""


class ExpertConfig(Checked):
    """The interface of every kind of expert.

    Attributes:
        stacked: whether the experts are ``StackedMlps``, which have the implementations blocked and
            ragged, and dropout.
        alike: whether the experts have equal structure, so that every parameter has an axis e in
            front.
        mixes_tokens: whether an output depends on more than one slot, which must hold tokens.
        learns: whether the experts have parameters.
    """

    section = "model.moe.experts"
    stacked = False
    alike = True
    mixes_tokens = False
    learns = True

    @property
    def members(self) -> tuple[Any, ...]:
        """The different kinds in it: the experts of a list, in order, or this kind alone."""
        return (self,)


@dataclasses.dataclass(frozen=True)
class MlpExpert(ExpertConfig):
    """Two linear layers with an activation between them: the experts of V-MoE."""

    kind: Literal["mlp"] = "mlp"
    """The kind of expert."""
    mlp_dim: Count | None = None
    """Hidden width; if None, the model's."""
    activation: Activation | None = None
    """The activation; if None, the model's."""

    stacked = True


@dataclasses.dataclass(frozen=True)
class GatedMlpExpert(ExpertConfig):
    """A gated MLP: down(activation(gate(x)) * up(x)); SwiGLU with silu (arXiv 2002.05202)."""

    kind: Literal["gated_mlp"] = "gated_mlp"
    """The kind of expert."""
    mlp_dim: Count | None = None
    """Hidden width; if None, the model's. Two thirds of an MLP's give as many parameters."""
    activation: Activation = "silu"
    """The activation of the gating half."""

    stacked = True


@dataclasses.dataclass(frozen=True)
class CnnExpert(ExpertConfig):
    """A depthwise convolution over the patch grid and a linear layer, with GELU between them.

    The convolution reads the patches in the expert's slots; all others are zeros to it. Needs a
    square grid of patches.
    """

    kind: Literal["cnn"] = "cnn"
    """The kind of expert."""
    kernel_size: Annotated[int, at_least(1)] = 3
    """Side of the convolution's kernel in patches."""

    mixes_tokens = True


@dataclasses.dataclass(frozen=True)
class AttentionExpert(ExpertConfig):
    """Self-attention among the tokens of an image that are in the expert's slots."""

    kind: Literal["attention"] = "attention"
    """The kind of expert."""
    num_heads: Count = 1
    """Number of attention heads, which divides the width."""

    mixes_tokens = True


@dataclasses.dataclass(frozen=True)
class IdentityExpert(ExpertConfig):
    """Returns its tokens as they are."""

    kind: Literal["identity"] = "identity"
    """The kind of expert."""

    learns = False


@dataclasses.dataclass(frozen=True)
class ZeroExpert(ExpertConfig):
    """Returns zeros: its tokens skip the layer, as far as they chose it."""

    kind: Literal["zero"] = "zero"
    """The kind of expert."""

    learns = False


@dataclasses.dataclass(frozen=True)
class ConstantExpert(ExpertConfig):
    """A weighted mean of the token and a learned vector (MoE++, arXiv 2410.07348)."""

    kind: Literal["constant"] = "constant"
    """The kind of expert."""


ListedExpert = (
    MlpExpert
    | GatedMlpExpert
    | CnnExpert
    | AttentionExpert
    | IdentityExpert
    | ZeroExpert
    | ConstantExpert
)


@dataclasses.dataclass(frozen=True)
class ExpertList(ExpertConfig):
    """Experts of different kinds."""

    kind: Literal["list"] = "list"
    """The kind of expert."""
    each: Annotated[tuple[ListedExpert, ...], NOT_EMPTY] = (MlpExpert(),)
    """The experts, in order; as many as num_experts."""

    alike = False

    @property
    def members(self) -> tuple[Any, ...]:
        return self.each


Expert = ListedExpert | ExpertList
