"""A vision transformer and its MoE layers."""

import dataclasses
from collections.abc import Callable
from typing import Annotated, Literal

from vmoe.config.experts import (
    Activation,
    AnyMlpExpert,
    AttentionExpert,
    CnnExpert,
    Expert,
    MlpExpert,
    sends_rows,
)
from vmoe.config.gates import Gate, LinearGate, SlotGate
from vmoe.config.rotary import Rotary
from vmoe.errors import UsageError
from vmoe.fields import (
    LARGEST_COUNT,
    Checked,
    Count,
    Positive,
    Rate,
    at_least,
    at_most,
    less_than,
)
from vmoe.routing.router import AnyRouter
from vmoe.routing.token_choice import TokenChoice

Resampling = Literal["bilinear", "bicubic", "bicubic_antialias"]


@dataclasses.dataclass(frozen=True)
class Exchange(Checked):
    """How the rows of tokens, or slots, travel to their experts and back.

    Its data type acts on any number of devices, all else only where experts are on several.
    """

    section = "model.moe.exchange"

    dtype: Literal["float32", "bfloat16"] = "float32"
    """Data type of the rows sent to the experts and back."""
    buffer_factor: Positive | None = None
    """In training, how many rows a device sends at most to each of the devices that share the
    experts, itself included: this many times the even share of its choices. Only for experts that
    send rows, as without a capacity. What is over is dropped, those with the smallest weights
    first, and counted. If None, all rows fit. With ``ragged`` it bounds all rows that a device
    receives, as MaxText's ``ragged_buffer_factor``: as many times their even share."""
    hot_experts: Annotated[int, at_least(0)] = 0
    """How many experts every device computes for its own tokens: those that the batch chooses most
    often, whose parameters are sent to it instead of its rows to them (the shadowing of FasterMoE,
    PPoPP 2022). Only for experts that send rows; it changes nothing on one device."""
    chunks: Count = 1
    """In how many parts the rows or the slots of MLPs are sent to their experts and back, so that
    one part can travel while another is computed. It changes nothing on one device."""
    ragged: bool = False
    """Send each device its rows alone, into one buffer for the rows of all senders, by
    ``jax.lax.ragged_all_to_all``. Only for experts that send rows, on GPUs and TPUs; it changes
    nothing on one device."""

    def __post_init__(self) -> None:
        super().__post_init__()
        at_once = "all rows are sent at once, leave one of them out"
        self.require(not self.ragged or self.chunks == 1, at_once, "ragged", "chunks")

    @property
    def at_once(self) -> "Exchange":
        """The exchange of few rows: all at once, in buffers that hold them."""
        return Exchange(self.dtype)

    def in_evaluation(self) -> "Exchange":
        """The exchange in evaluation, where all rows fit."""
        return dataclasses.replace(self, buffer_factor=None)


@dataclasses.dataclass(frozen=True)
class MoEConfig(Checked):
    """One MoE layer: its experts, its gate and its router."""

    section = "model.moe"

    num_experts: Annotated[int, at_least(1)] = 8
    """Number of experts."""
    experts: Expert = MlpExpert()
    """The experts: copies of one kind, or a list of different ones."""
    gate: Gate | None = None
    """How the logits are computed; if None, a linear gate, or slots for a soft router."""
    router: AnyRouter = TokenChoice()  # its kind says how tokens are assigned to experts
    shared_experts: Annotated[int, at_least(0)] = 0
    """Experts that every token uses besides the routed ones: an MLP with this many times the hidden
    width, whose outputs are added (DeepSeekMoE, arXiv 2401.06066)."""
    shared_gate: bool = False
    """Multiply the outputs of the shared experts by the sigmoid of a linear layer of the token
    (Qwen2-MoE, arXiv 2407.10671)."""
    routed_scale: Positive = 1.0
    """Factor of the combine weights, so that routed outputs are as large as those of shared experts
    (the ``route_scale`` of DeepSeek-V3's code, arXiv 2412.19437)."""
    exchange: Exchange = Exchange()
    """How rows or slots travel to the experts and back."""

    def __post_init__(self) -> None:
        super().__post_init__()
        require, router, experts = self.require, self.router, self.experts
        k, per_slot = router.k, router.logits_per == "slot"
        if router.has("k"):
            require(k <= self.num_experts, "lower k or add experts", "router.k", "num_experts")
        needs = f"this router needs at least {k} experts"
        require(k <= self.num_experts, needs, "num_experts", "router.kind")
        drops = self.exchange.buffer_factor is None or router.can_drop
        never = "no choice of this router may be dropped, leave it out"
        require(drops, never, "exchange.buffer_factor", "router.kind")
        most = f"use at most {self.num_experts}"
        require(self.exchange.hot_experts <= self.num_experts, most, "exchange.hot_experts")
        stacked = self.exchange.chunks == 1 or isinstance(experts, AnyMlpExpert)
        alone = "only MLPs of one kind can be sent in parts, leave it out"
        require(stacked, alone, "exchange.chunks", "experts.kind")
        by_slots = experts.implementation in ("auto", "batched")
        fills = "a soft router fills every slot, use batched"
        require(not per_slot or by_slots, fills, "experts.implementation")
        shares = len(router.shares) in (0, self.num_experts)
        require(shares, "give one for each expert", "router.shares", "num_experts")
        per = f"logits per {router.logits_per}" if router.learned else "no gate"
        fits = self.gate is None or self.gate.logits_per == router.logits_per
        needs = f"this router needs {per}, leave the gate out"
        require(fits, needs, "gate.kind", "router.kind")
        fits = experts.alike or len(experts.members) == self.num_experts
        require(fits, "list as many experts", "num_experts", "experts.each")
        require(
            not per_slot or not any(expert.mixes_tokens for expert in experts.members),
            "a soft router fills slots with mixtures of tokens, which these experts cannot mix; "
            "use another router",
            "experts.kind",
            "router.kind",
        )
        without = "there is no shared expert, use False"
        require(not self.shared_gate or self.shared_experts > 0, without, "shared_gate")

    @property
    def sends_rows(self) -> bool:
        """See ``vmoe.config.experts.sends_rows``."""
        return sends_rows(self.experts.implementation, dropless=self.router.dropless)

    def slots(self, s: int) -> int:
        """Slots of an expert for a group of s tokens in evaluation."""
        return self.router.in_evaluation().slots(s, self.num_experts)

    def rounded_factor(self, s: int) -> float:
        """The capacity factor for a group of s tokens in evaluation, after rounding to slots."""
        return self.slots(s) * self.num_experts / (s * self.router.k)

    @property
    def divisible_experts(self) -> int:
        """The number of experts that can be split over devices; 1 if they are of several kinds."""
        return self.num_experts if self.experts.alike else 1

    @property
    def each_expert(self) -> tuple[Expert, ...]:
        """The config of each expert, in order."""
        members = self.experts.members
        return members * self.num_experts if self.experts.alike else members

    @property
    def gate_config(self) -> Gate | None:
        """The config of the gate, which the router determines if none is given.

        None if the router reads no logits.
        """
        own = {"expert": LinearGate(), "slot": SlotGate(), None: None}
        return self.gate or own[self.router.logits_per]

    @property
    def shared_phrase(self) -> str:
        """What a description says after the number of experts, such as " and 2 gated shared"."""
        gated = "gated " * self.shared_gate
        return f" and {self.shared_experts} {gated}shared" if self.shared_experts else ""

    @property
    def can_be_pruned(self) -> bool:
        """Whether experts of a trained layer can be pruned, added and merged.

        They can if all are of one kind, and the gate has a column of parameters for each.
        """
        gate = self.gate_config
        return self.experts.alike and gate is not None and bool(gate.columns)


@dataclasses.dataclass(frozen=True)
class ViTConfig(Checked):
    """A vision transformer with dense and sparse blocks. The defaults are V-MoE S/32."""

    section = "model"

    patch_size: Count = 32
    """Side of a patch in pixels."""
    width: Count = 512
    """Width of the tokens."""
    depth: Count = 8
    """Number of blocks."""
    mlp_dim: Count = 2048
    """Hidden width of an MLP, and of an expert."""
    num_heads: Count = 8
    """Number of attention heads."""
    image_size: Annotated[int, at_least(1), less_than(2**16)] = 224
    """Side of the images in pixels; learned positions are resampled for other sizes."""
    num_classes: Annotated[int, at_least(0), at_most(LARGEST_COUNT)] = 1000
    """Number of logits; with 0 the model returns features."""
    pooling: Literal["class_token", "mean", "attention", "patch_mean"] = "class_token"
    """How tokens are pooled. class_token: the class token; mean: the mean of the patch tokens,
    without a class token; attention: attention pooling of the patch tokens, without a class token;
    patch_mean: the mean of the patch tokens, with a class token that is not pooled."""
    registers: Annotated[int, at_least(0), at_most(LARGEST_COUNT)] = 0
    """Learned tokens between the class token and the patches, which have no positions and are not
    pooled ("Vision Transformers Need Registers", arXiv 2309.16588)."""
    positions: Literal["learned", "sincos2d", "none"] = "learned"
    """Position embeddings: learned; fixed sines and cosines of both coordinates (sincos2d); or
    none."""
    rotary: Rotary | None = None
    """Rotary positions besides these: queries and keys of patches are rotated by their row and
    column (arXiv 2104.09864); if None, there are none."""
    position_std: float = 0.02
    """Initial standard deviation of learned positions; 1.0 suits short training."""
    position_resampling: Resampling = "bilinear"
    """How learned positions are resampled for images of another size. bilinear: with the corners
    of both grids aligned (V-MoE, big_vision); bicubic: as by PyTorch (ViT and DINOv2 of Hugging
    Face); bicubic_antialias: the same with antialiasing (timm, DINOv2 with registers)."""
    pre_logits: Annotated[int, at_least(1)] | None = None
    """Width of a dense layer with tanh before the head; None for no such layer."""
    head_std: float = 0.0
    """Initial standard deviation of the head's kernel."""
    head_bias: float = 0.0
    """Initial bias of the head."""
    activation: Activation = "gelu_tanh"
    """The activation of MLPs and experts. gelu_tanh: approximate GELU (V-MoE, ViT in JAX); gelu:
    exact GELU (timm, Hugging Face); quick_gelu: x * sigmoid(1.702 x) (CLIP); relu: max(x, 0); silu:
    x * sigmoid(x), of most gated MLPs (SwiGLU)."""
    mlp: Literal["plain", "gated", "gated_norm"] = "plain"
    """The dense MLPs of blocks; those of shared experts and of attention pooling are plain. plain:
    down(activation(up(x))); gated: down(activation(gate(x)) * up(x)) (arXiv 2002.05202);
    gated_norm: the same with a norm before the last layer (EVA-02)."""
    norm: Literal["layer", "rms"] = "layer"
    """The norms; those of queries and keys are layer norms without biases. layer: layer norm; rms:
    RMSNorm, which neither subtracts the mean nor adds a bias (arXiv 1910.07467)."""
    norm_epsilon: Positive = 1e-6
    """Added to the variance in norms, except in those of queries and keys."""
    pre_norm: bool = False
    """Normalize the tokens before the first block as well (CLIP)."""
    fc_norm: bool = False
    """Normalize after pooling instead of before."""
    attention_norm: bool = False
    """Normalize the outputs of the attention heads before the last layer (EVA-02's CLIP)."""
    qk_norm: bool = False
    """Normalize queries and keys (arXiv 2302.05442)."""
    qk_rms: bool = False
    """Divide queries and keys by their root mean squares, without parameters (SigLino)."""
    attention_sink: bool = False
    """Add a learned logit of each head, the sink, to the softmax of the attention, whose weights
    then sum to less than 1. So a head is gated by sigmoid(log(sum(exp(logits))) - sink) (SigLino,
    arXiv 2512.20157)."""
    head_dim: Count | None = None
    """Width of an attention head; if None, width / num_heads."""
    dropout: Rate = 0.0
    """Dropout rate of embeddings, attention outputs and dense MLPs."""
    attention_dropout: Rate = 0.0
    """Dropout rate of attention weights."""
    sparse_blocks: tuple[int, ...] = ()
    """Blocks that have experts instead of an MLP, counted from 0."""
    moe: MoEConfig | tuple[MoEConfig, ...] = MoEConfig()
    """The MoE layers: one config for all sparse blocks, or one for each of them, in order."""
    dtype: Literal["float32", "bfloat16"] = "float32"
    """Data type of the computation; parameters and router logits are always float32."""
    full_last_block: bool = False
    """Compute the last block for all tokens, even if only the class token is used after it. Logits,
    losses and gradients are the same, except for the random draws of dropout."""
    remat: bool = False
    """Recompute each block's activations in the backward pass instead of saving them."""

    def __post_init__(self) -> None:
        super().__post_init__()
        whole = self.width % self.num_heads == 0
        divides = whole or (self.head_dim is not None and self.pooling != "attention")
        self.require(divides, "use a divisor of the width", "num_heads", "width")
        self.require(not (self.qk_norm and self.qk_rms), "use one of them", "qk_norm", "qk_rms")
        divides = self.image_size % self.patch_size == 0
        self.require(divides, "use a divisor of the image size", "patch_size", "image_size")
        divides = self.positions != "sincos2d" or self.width % 4 == 0
        self.require(divides, "use a multiple of 4", "width", "positions")
        divides = self.rotary is None or self.dim_per_head % 4 == 0
        remedy = "use heads of a width that is a multiple of 4"
        of_heads = "head_dim" if self.head_dim else "num_heads"
        self.require(divides, remedy, of_heads, "rotary.kind")
        blocks = self.sparse_blocks
        valid = list(blocks) == sorted(set(blocks)) and all(0 <= i < self.depth for i in blocks)
        self.require(valid, "use ascending numbers below the depth", "sparse_blocks", "depth")
        self.require(
            isinstance(self.moe, MoEConfig) or len(self.moe) == len(blocks),
            f"give one config, or one for each of the {len(blocks)} sparse blocks",
            "moe",
            "sparse_blocks",
        )

        for moe in self.moe_blocks.values():
            if moe.router.takes:
                router, names = type(moe.router).__name__, ", ".join(moe.router.takes)
                fields = {"model.moe.router": router}
                raise UsageError(f"a ViT has no {names} for each token: use another", **fields)
            for expert in moe.experts.members:
                if isinstance(expert, CnnExpert) and self.registers:
                    fields = {"model.registers": self.registers, "model.moe.experts.kind": "cnn"}
                    needs = "cnn experts need a grid of patches: use no registers, or other experts"
                    raise UsageError(needs, **fields)
                heads = expert.num_heads if isinstance(expert, AttentionExpert) else 1
                if self.width % heads:
                    fields = {"model.moe.experts.num_heads": heads, "model.width": self.width}
                    raise UsageError("use a divisor of the width", **fields)

    @property
    def dim_per_head(self) -> int:
        """Width of an attention head."""
        return self.head_dim or self.width // self.num_heads

    @property
    def description(self) -> str:
        """Such as "12 blocks, width 384, 6 heads, gated MLP 1536, patches of 16 px, 4 registers".

        After the patches come registers and other parts that V-MoE does not have.
        """
        head_dim = f" of {self.head_dim}" if self.head_dim else ""
        parts = (
            f"{self.depth} blocks, width {self.width}, {self.num_heads} heads{head_dim}",
            f"{'gated ' * (self.mlp != 'plain')}MLP {self.mlp_dim}",
            f"patches of {self.patch_size} px",
            self.registers and f"{self.registers} registers",
            self.rotary and f"rotary positions ({self.rotary.kind})",
            self.norm == "rms" and "RMSNorm",
            (self.qk_norm or self.qk_rms) and "normalized queries and keys",
            self.attention_sink and "attention sinks",
        )
        return ", ".join(str(part) for part in parts if part)

    @property
    def has_class_token(self) -> bool:
        """Whether a learned token comes before the patches."""
        return self.pooling in ("class_token", "patch_mean")

    @property
    def class_token_last(self) -> bool:
        """Whether the last block computes its outputs for the class token alone."""
        return self.pooling == "class_token" and not self.full_last_block

    @property
    def prefix_tokens(self) -> int:
        """Tokens before the patches: the class token, if any, then the registers."""
        return self.has_class_token + self.registers

    @property
    def moe_blocks(self) -> dict[int, MoEConfig]:
        """The config of each MoE layer, by the number of its block."""
        if isinstance(self.moe, MoEConfig):
            return dict.fromkeys(self.sparse_blocks, self.moe)
        return dict(zip(self.sparse_blocks, self.moe, strict=True))

    @property
    def can_drop(self) -> bool:
        """Whether any router lets tokens choose experts, so that a choice can be dropped."""
        return any(moe.router.can_drop for moe in self.moe_blocks.values())

    @property
    def learned(self) -> bool:
        """Whether any layer has a gate, which is trained."""
        return any(moe.router.learned for moe in self.moe_blocks.values())

    def with_layers(self, change: Callable[[MoEConfig], MoEConfig]) -> "ViTConfig":
        """This config with every MoE layer changed by a function."""
        if isinstance(self.moe, MoEConfig):
            return dataclasses.replace(self, moe=change(self.moe))
        return dataclasses.replace(self, moe=tuple(map(change, self.moe)))

    def moe_of(self, block: int) -> MoEConfig | None:
        """The config of a block's MoE layer; None if the block is dense."""
        return self.moe_blocks.get(block)
