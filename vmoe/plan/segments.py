"""A training step as segments: one for each kind of block, and one for the rest of the model.

Identical blocks are compiled once, and their cost is multiplied by their number. With
``accumulate`` a segment computes one part of the batch. The rest of a step consists of reductions
to scalars, norms and metrics, of a few bytes each.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float

from vmoe import models
from vmoe.config import MoEConfig, TrainConfig, ViTConfig, replace
from vmoe.costs.flops import countable
from vmoe.nn.losses import cross_entropy
from vmoe.nn.patches import num_tokens
from vmoe.nn.vit import ViT
from vmoe.plan.segment import Inputs, Segment
from vmoe.sharding import Placement
from vmoe.train.lr_factors import Params


class _BlockKind(NamedTuple):
    """The properties that determine the program of a block; equal kinds have equal programs."""

    moe: MoEConfig | None
    class_token_only: bool


def segments(config: TrainConfig, placement: Placement) -> list[Segment]:
    """The segments of a training step: the kinds of blocks in order, then embedding and head."""
    model = countable(config.model)
    blocks = [
        _block_segment(config, placement, kind, _name(model, kind, indices), len(indices))
        for kind, indices in _kinds(model).items()
    ]
    return [*blocks, _ends_segment(config, placement)]


def _kinds(model: ViTConfig) -> dict[_BlockKind, list[int]]:
    kinds: dict[_BlockKind, list[int]] = {}
    for block in range(model.depth):
        kind = _BlockKind(model.moe_of(block), model.class_token_last and block == model.depth - 1)
        kinds.setdefault(kind, []).append(block)
    return kinds


def _name(model: ViTConfig, kind: _BlockKind, indices: list[int]) -> str:
    sparsity = "dense" if kind.moe is None else "sparse"
    if indices == [model.depth - 1]:
        return f"last block, {sparsity}"
    several = len(set(model.moe_blocks.values())) > 1
    return f"{sparsity} block" + (f" (as block {indices[0]})" if kind.moe and several else "")


def _block_segment(
    config: TrainConfig, placement: Placement, kind: _BlockKind, name: str, times: int
) -> Segment:
    """One block of the model; its outputs are tokens and auxiliary losses."""
    model = _one_block(config.model, kind.moe)
    vit = models.build_abstract(model, placement=placement)
    graph, params, rest = nnx.split(vit, nnx.PathContains("blocks"), ...)

    def forward(params: Params, inputs: Inputs) -> tuple[Float[Array, "b x d"], list[Array]]:
        vit: ViT = nnx.merge(graph, params, rest)
        only = kind.class_token_only
        outputs = vit.run_block(0, **inputs, rotation=vit.rotation(), class_token_only=only)
        return outputs.tokens, [] if outputs.record is None else [outputs.record.aux_loss]

    b, n = config.batch_size // config.accumulate, num_tokens(model)
    inputs = {
        "tokens": jax.ShapeDtypeStruct((b, n, model.width), model.dtype),
        "valid": jax.ShapeDtypeStruct((b,), bool),
        "key": _key(),
    }
    return Segment(name, times, config, placement, nnx.to_pure_dict(params), inputs, forward)


def _ends_segment(config: TrainConfig, placement: Placement) -> Segment:
    """The model without its blocks: embedding, last norm, pooling, head and loss."""
    model = _one_block(config.model, None)
    vit = models.build_abstract(model, placement=placement)
    vit.blocks = nnx.List([])
    graph, params, rest = nnx.split(vit, nnx.Param, ...)

    def forward(params: Params, inputs: Inputs) -> Float[Array, ""]:
        vit: ViT = nnx.merge(graph, params, rest)
        logits = vit.head(vit.pool(vit.last_norm(vit.embed(inputs["images"], inputs["key"]))))
        return cross_entropy(logits, inputs["labels"], config.loss).mean()

    b, side = config.batch_size // config.accumulate, model.image_size
    inputs = {
        "images": jax.ShapeDtypeStruct((b, side, side, 3), jnp.float32),
        "labels": jax.ShapeDtypeStruct((b, model.num_classes), jnp.float32),
        "key": _key(),
    }
    params = nnx.to_pure_dict(params)
    return Segment("embedding and head", 1, config, placement, params, inputs, forward)


def _one_block(model: ViTConfig, moe: MoEConfig | None) -> ViTConfig:
    """The model with one block, sparse or (if ``moe`` is None) dense."""
    sparse_blocks = () if moe is None else (0,)
    return replace(model, depth=1, sparse_blocks=sparse_blocks, moe=moe or MoEConfig())


def _key() -> jax.ShapeDtypeStruct:
    return jax.eval_shape(lambda: jax.random.key(0))
