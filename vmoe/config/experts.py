"""One dataclass per kind of expert, with its settings."""

import dataclasses
from typing import Annotated, Any, Literal, Self

from vmoe.errors import require
from vmoe.fields import NOT_EMPTY, Checked, Count, Rate, at_least

Activation = Literal["gelu", "gelu_tanh", "quick_gelu", "relu", "silu"]
"""The activation of an MLP, by its name in timm. gelu, gelu_tanh, quick_gelu: GELU(x) exactly, by
the tanh approximation, or as x * sigmoid(1.702 x); relu: max(x, 0); silu: x * sigmoid(x)."""
Implementation = Literal["batched", "blocked", "ragged"]
"""How MLPs compute (``vmoe/nn/implementations.py``)."""


def sends_rows(implementation: Literal["auto", Implementation], *, dropless: bool) -> bool:
    """Whether the rows of kept choices travel between devices, rather than all slots."""
    return dropless if implementation == "auto" else implementation != "batched"


class ExpertConfig(Checked):
    """The interface of every kind of expert.

    Attributes:
        alike: whether the experts have equal structure, so that every parameter has an axis e in
            front.
        mixes_tokens: whether an output depends on more than one slot, which must hold tokens.
        learns: whether the experts have parameters.
    """

    section = "model.moe.experts"
    alike = True
    mixes_tokens = False
    learns = True

    @property
    def members(self) -> tuple[Any, ...]:
        """The different kinds in it: the experts of a list, in order, or this kind alone."""
        return (self,)

    @property
    def shared_init(self) -> bool:
        """Whether all experts of a layer start from the same values."""
        return True

    @property
    def dropout(self) -> float:
        """Dropout rate inside the experts."""
        return 0.0

    @property
    def implementation(self) -> Literal["auto", Implementation]:
        """How the experts compute; all but MLPs are computed slot by slot."""
        return "batched"

    def computed(self, implementation: Implementation) -> Self:
        """These experts with another implementation, if they have several."""
        return self


@dataclasses.dataclass(frozen=True)
class LearnedExpert(ExpertConfig):
    """An expert with parameters."""

    kind: str = ""
    """The kind of expert."""
    shared_init: bool = True
    """Whether all experts of this kind in a layer start from the same values."""


@dataclasses.dataclass(frozen=True)
class AnyMlpExpert(LearnedExpert):
    """An MLP, of which a layer computes all experts together."""

    mlp_dim: Count | None = None
    """Hidden width; if None, the model's."""
    dropout: Rate = 0.0
    """Dropout rate of the hidden layer."""
    implementation: Literal["auto", Implementation] = "auto"
    """How the experts compute. auto: chosen by platform and shape; batched: one batched matmul over
    all slots; blocked: a loop over blocks of rows; ragged: a ragged matmul of sorted rows."""

    def computed(self, implementation: Implementation) -> Self:
        return dataclasses.replace(self, implementation=implementation)


@dataclasses.dataclass(frozen=True)
class MlpExpert(AnyMlpExpert):
    """Two linear layers with an activation between them: the experts of V-MoE."""

    kind: Literal["mlp"] = "mlp"
    """The kind of expert."""
    activation: Activation | None = None
    """The activation; if None, the model's."""


@dataclasses.dataclass(frozen=True)
class GatedMlpExpert(AnyMlpExpert):
    """A gated MLP: down(activation(gate(x)) * up(x)); SwiGLU with silu (arXiv 2002.05202)."""

    kind: Literal["gated_mlp"] = "gated_mlp"
    """The kind of expert."""
    mlp_dim: Count | None = None
    """Hidden width; if None, the model's. Two thirds of an MLP's give as many parameters."""
    activation: Activation = "silu"
    """The activation of the gating half."""


@dataclasses.dataclass(frozen=True)
class CnnExpert(LearnedExpert):
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
class AttentionExpert(LearnedExpert):
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

    def __post_init__(self) -> None:
        super().__post_init__()
        for i, expert in enumerate(self.each):
            by_slots = expert.implementation in ("auto", "batched")
            of_a_list = "the experts of a list are computed slot by slot, use batched"
            place = f"{self.section}.each.{i}.implementation"
            require(by_slots, of_a_list, **{place: expert.implementation})

    @property
    def members(self) -> tuple[Any, ...]:
        return self.each


Expert = ListedExpert | ExpertList
