"""A vision transformer and its sparse layers."""

import dataclasses
from collections.abc import Callable
from typing import Literal

from vmoe.config.fields import LARGEST_COUNT, Checked, require, require_count, require_rate
from vmoe.config.routers import Router, TokenChoice

Implementation = Literal["batched", "blocked", "ragged"]
"""How the experts compute (``vmoe/nn/implementations.py``)."""
Gelu = Literal["tanh", "erf", "quick"]
"""GELU(x): by the tanh approximation; exactly, by erf; or x * sigmoid(1.702 x)."""


@dataclasses.dataclass(frozen=True)
class MoEConfig(Checked):
    """One sparse layer: its experts, its router and its number of slots."""

    section = "moe"

    num_experts: int = 8
    router: Router = TokenChoice()
    capacity_factor: float = 1.05
    """Slots per token and choice; slots of an expert = s * k * capacity_factor / e, rounded."""
    capacity: int | None = None
    """Slots per expert and group; overrides the capacity factor and its rounding."""
    capacity_rounding: Literal["ceil", "round"] = "ceil"
    """How the number of slots is rounded to an integer; round rounds half to even."""
    capacity_multiple: int = 4
    """The capacity is rounded up to a multiple of this."""
    dropless: bool = False
    """No capacity: no choice is dropped; for token choice."""
    images_per_group: int = 8
    """Maximum number of images whose tokens compete for slots; 1 makes images
    independent, up to rounding."""
    expert_dropout: float = 0.0
    """Dropout rate inside the experts."""
    shared_init: bool = True
    """Whether all experts of a layer start from the same values."""
    transfer_dtype: Literal["float32", "bfloat16"] = "float32"
    """Data type of the rows sent to the experts and back."""
    implementation: Literal["auto", Implementation] = "auto"
    """How the experts compute: auto chooses by platform and shape; batched is one batched matmul
    over all slots; blocked loops over blocks of rows; ragged is a ragged matmul of sorted rows."""

    def __post_init__(self) -> None:
        super().__post_init__()
        require(self.num_experts >= 1, f"moe.num_experts={self.num_experts}: use at least one")
        k, per_slot = self.router.experts_per_token, self.router.logits_per == "slot"
        require(
            k <= self.num_experts,
            f"moe.router.k={k} is more than moe.num_experts={self.num_experts}: lower k or add "
            "experts",
        )
        require(
            self.capacity is None or self.capacity >= 1,
            f"moe.capacity={self.capacity}: an expert needs at least one slot",
        )
        require(
            self.capacity_factor > 0, f"moe.capacity_factor={self.capacity_factor}: use more than 0"
        )
        require(self.capacity_multiple >= 1, "moe.capacity_multiple: use at least 1")
        require(self.images_per_group >= 1, "moe.images_per_group: use at least 1")
        require(
            not self.dropless or self.capacity is None,
            f"moe.dropless with moe.capacity={self.capacity}: give one of the two",
        )
        require(
            not self.dropless or self.router.can_drop,
            f"moe.dropless with router {self.router.kind}: it never drops a choice, use False",
        )
        require(
            not per_slot or self.images_per_group == 1,
            f"moe.images_per_group={self.images_per_group}: a soft router mixes the tokens of one "
            "image, set it to 1",
        )
        require(
            not per_slot or self.implementation in ("auto", "batched"),
            f"moe.implementation={self.implementation}: a soft router fills every slot, use "
            "batched",
        )
        require_rate("moe.expert_dropout", self.expert_dropout)


@dataclasses.dataclass(frozen=True)
class ViTConfig(Checked):
    """A vision transformer, some of whose blocks are sparse. The defaults are V-MoE's S/32."""

    section = "model"

    patch_size: int = 32
    """Side of a patch in pixels."""
    width: int = 512
    """Width of the tokens."""
    depth: int = 8
    """Number of blocks."""
    mlp_dim: int = 2048
    """Hidden width of an MLP, and of an expert."""
    num_heads: int = 8
    """Number of attention heads."""
    image_size: int = 224
    """Side of the images in pixels; for other sizes, learned positions are resampled."""
    num_classes: int = 1000
    """Width of the logits; 0 for no logits: the model returns features."""
    pooling: Literal["class_token", "mean", "attention", "patch_mean"] = "class_token"
    """What becomes the features: the class token; the mean of all tokens, or attention to them,
    without a class token; or the mean of the patches, beside which there is a class token."""
    positions: Literal["learned", "sincos2d", "none"] = "learned"
    position_std: float = 0.02
    """Initial standard deviation of learned positions; 1.0 suits short training."""
    pre_logits: int | None = None
    """Width of a dense layer with tanh before the head; None for no such layer."""
    head_std: float = 0.0
    """Initial standard deviation of the head's kernel."""
    head_bias: float = 0.0
    """Initial bias of the head."""
    gelu: Gelu = "tanh"
    """The activation of MLPs and experts: by the tanh approximation (V-MoE, ViT in JAX), exactly by
    erf (timm, Hugging Face), or x * sigmoid(1.702 x) (CLIP)."""
    norm_epsilon: float = 1e-6
    """Added to the variance in layer norms, except in those of queries and keys."""
    pre_norm: bool = False
    """Normalise the tokens before the first block, too (CLIP)."""
    fc_norm: bool = False
    """Normalise after pooling instead of before."""
    qk_norm: bool = False
    """Normalise queries and keys (arXiv 2302.05442)."""
    dropout: float = 0.0
    """Dropout rate of embeddings, attention outputs and dense MLPs."""
    attention_dropout: float = 0.0
    """Dropout rate of attention weights."""
    sparse_blocks: tuple[int, ...] = ()
    """Which blocks have experts in place of their MLP, counted from 0."""
    moe: MoEConfig | tuple[MoEConfig, ...] = MoEConfig()
    """One config for all sparse blocks, or one per sparse block, in order."""
    dtype: Literal["float32", "bfloat16"] = "float32"
    """Data type of the computation; parameters and router logits are always float32."""
    full_last_block: bool = False
    """Compute the last block for all tokens even if only the class token is used after it.
    Logits, losses and gradients are the same, except for dropout's random draws."""
    remat: bool = False
    """Recompute each block's activations in the backward pass instead of saving them."""

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in (
            "patch_size",
            "width",
            "depth",
            "mlp_dim",
            "num_heads",
            "image_size",
        ):
            require_count(f"model.{name}", getattr(self, name))
        require(self.image_size < 2**16, f"model.image_size={self.image_size}: use less than 65536")
        require(
            0 <= self.num_classes <= LARGEST_COUNT,
            f"model.num_classes={self.num_classes}: use 0 to {LARGEST_COUNT}",
        )
        require(self.norm_epsilon > 0, f"model.norm_epsilon={self.norm_epsilon}: use more than 0")
        require(
            self.width % self.num_heads == 0,
            f"model.num_heads={self.num_heads} does not divide model.width={self.width}",
        )
        require(
            self.image_size % self.patch_size == 0,
            f"model.patch_size={self.patch_size} does not divide "
            f"model.image_size={self.image_size}",
        )
        require(
            self.positions != "sincos2d" or self.width % 4 == 0,
            f"model.width={self.width}: positions=sincos2d needs a multiple of 4",
        )
        blocks = self.sparse_blocks
        require(
            list(blocks) == sorted(set(blocks)) and all(0 <= i < self.depth for i in blocks),
            f"model.sparse_blocks={blocks}: give ascending block numbers below depth={self.depth}",
        )
        require(
            isinstance(self.moe, MoEConfig) or len(self.moe) == len(blocks),
            f"model.moe: give one config, or one for each of the {len(blocks)} sparse blocks",
        )
        require(
            self.pre_logits is None or self.pre_logits >= 1,
            f"model.pre_logits={self.pre_logits}: use a width of at least 1, or None",
        )
        require_rate("model.dropout", self.dropout)
        require_rate("model.attention_dropout", self.attention_dropout)

    @property
    def has_class_token(self) -> bool:
        """Whether a learned token comes before the patches."""
        return self.pooling in ("class_token", "patch_mean")

    @property
    def moe_blocks(self) -> dict[int, MoEConfig]:
        """The sparse-layer config of each sparse block, by the number of the block."""
        if isinstance(self.moe, MoEConfig):
            return dict.fromkeys(self.sparse_blocks, self.moe)
        return dict(zip(self.sparse_blocks, self.moe, strict=True))

    @property
    def can_drop(self) -> bool:
        """Whether any router lets tokens choose experts, so that a choice can be dropped."""
        return any(moe.router.can_drop for moe in self.moe_blocks.values())

    def with_layers(self, change: Callable[[MoEConfig], MoEConfig]) -> "ViTConfig":
        """The config with every sparse-layer config changed by a function."""
        if isinstance(self.moe, MoEConfig):
            return dataclasses.replace(self, moe=change(self.moe))
        return dataclasses.replace(self, moe=tuple(map(change, self.moe)))

    def moe_of(self, block: int) -> MoEConfig | None:
        """The sparse-layer config of a block; None if the block is dense."""
        return self.moe_blocks.get(block)
