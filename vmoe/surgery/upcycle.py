"""Sparse upcycling: the MLPs of a trained dense model become the experts of a sparse one.

Every expert starts as a copy of its block's MLP, and the router as in a new model, unless another
start is chosen (``starts.py``). If the combine weights are normalized over a token's experts and no
choice is dropped, copies have the logits of the dense model until they are trained.

Source: "Sparse Upcycling: Training Mixture-of-Experts from Dense Checkpoints" (arXiv 2212.05055).
"""

from collections.abc import Iterable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from einops import rearrange
from flax.traverse_util import flatten_dict, unflatten_dict
from jaxtyping import Array, Float

from vmoe import models, passes
from vmoe.config import (
    GatedMlpExpert,
    MlpExpert,
    MoEConfig,
    TokenChoice,
    ViTConfig,
    replace,
)
from vmoe.config.experts import Expert
from vmoe.data.pipeline import Batch
from vmoe.errors import require
from vmoe.fields import NOT_EMPTY
from vmoe.nn.vit import ViT
from vmoe.surgery.params import Params, initial_values, wanted_shapes, with_sparse_blocks
from vmoe.surgery.starts import COPIES, UpcyclingStart

Blocks = str | Iterable[int]
"""Blocks of a model: their numbers, or a name such as "every2" or "last2"."""

MOST_TOKENS = 1 << 14
"""Inputs of an MLP that are kept for a start: 67 MB a block for tokens of width 1,024."""


def upcycle(
    model: ViT,
    *,
    blocks: Blocks = "every2",
    num_experts: int = 8,
    start: UpcyclingStart = COPIES,
    images: Float[np.ndarray, "b h w 3"] | None = None,
    seed: int = 0,
    **moe: Any,
) -> ViT:
    """A model in which experts replace some of the MLPs; it shares the other arrays.

    Args:
        model: a dense or sparse model; it does not change.
        blocks: every second block ("every2"), the last n of these ("last2"), or block numbers.
        start: what experts and routers start from, such as ``vmoe.surgery.Drop(0.5)``; by default
            experts are copies of the MLP.
        images: pixels in [-1, 1], for a start that reads tokens.
        seed: seed of the routers, as for ``models.build``, and of the start.
        moe: other fields of ``MoEConfig``; see ``upcycled_layer`` for the defaults.

    Raises:
        UsageError: a block does not exist or is sparse already, fields are incompatible or do not
            fit the start, images are missing or not read, or a layer is not the one in its config.

    >>> import vmoe
    >>> vmoe.upcycle(vmoe.create_model("vit_test"), num_experts=4).config.sparse_blocks
    (1, 3)
    """
    models.check_described(model)
    unread = f"{type(start).__name__} reads no images: leave them out"
    require(images is None or start.reads_tokens, unread)
    batches = () if images is None else passes.in_batches(np.asarray(images))
    chosen = _dense_blocks(model.config, blocks)
    config, params = upcycle_params(
        model.config,
        models.params_of(model),
        blocks=chosen,
        moe=upcycled_layer(model.config, start, num_experts=num_experts, **moe),
        start=start,
        tokens=mlp_inputs(model, batches, chosen, seed=seed),
        seed=seed,
    )
    return models.with_params(config, params, placement=model.placement)


def upcycled_layer(dense: ViTConfig, start: UpcyclingStart = COPIES, **fields: Any) -> MoEConfig:
    """The config of an upcycled layer of a dense model, with some fields changed.

    By default the experts have the dropout of the MLPs that they replace, and the router is a token
    choice that normalizes the weights of a token's experts, without a capacity unless the fields of
    the router have one. With a capacity factor of e / k no choice is dropped either. A start may
    need other defaults.

    Raises:
        UsageError: the start does not take the model's MLPs, or a field is wrong or does not fit.
    """
    start.check_mlps(dense)
    given = fields.get("router", {})
    limited = isinstance(given, dict) and {"dropless", "capacity", "capacity_factor"} & given.keys()
    router = TokenChoice(normalize_weights=True, dropless=not limited)
    experts: Expert = MlpExpert(dropout=dense.dropout)
    if dense.mlp != "plain":
        experts = GatedMlpExpert(dropout=dense.dropout, activation=dense.activation)
    layer = MoEConfig(router=router, experts=experts)
    read = {name: fields[name] for name in ("num_experts", "router") if name in fields}
    layer = replace(layer, **start.fields(dense, replace(layer, **read)))
    layer = replace(layer, **fields)
    start.check_layer(dense, layer)
    return layer


def upcycle_params(
    config: ViTConfig,
    params: Params,
    *,
    blocks: Blocks,
    moe: MoEConfig,
    start: UpcyclingStart = COPIES,
    tokens: Mapping[int, Float[np.ndarray, "r d"]] | None = None,
    seed: int = 0,
    initial: Params | None = None,
) -> tuple[ViTConfig, Params]:
    """``upcycle`` for parameters as nested dicts.

    Args:
        tokens: inputs of the MLP of each block, for a start that reads them; see ``mlp_inputs``.
        initial: a tree of the new model to take the routers from, instead of the seed; zeros for
            the moments of an optimizer.
    """
    start.check_mlps(config)
    start.check_layer(config, moe)
    chosen = _dense_blocks(config, blocks)
    target = with_sparse_blocks(config, config.moe_blocks | dict.fromkeys(chosen, moe))
    arrays = flatten_dict(params)
    for block in chosen:
        place, mlp = ("blocks", block, "mlp"), params["blocks"][block]["mlp"]
        for path in flatten_dict(mlp):
            del arrays[*place, *path]
        key = jax.random.fold_in(jax.random.key(seed), block)
        layer = start.params(mlp, moe, key, (tokens or {}).get(block))
        arrays |= {(*place, *path): value for path, value in flatten_dict(layer).items()}
    wanted = wanted_shapes(target, initial)
    new = [path for path in wanted if path not in arrays]
    arrays |= initial_values(target, new, seed=seed, initial=initial)
    return target, unflatten_dict({path: arrays[path] for path in wanted})


def mlp_inputs(
    model: ViT,
    batches: Iterable[Batch],
    blocks: Blocks,
    *,
    most: int = MOST_TOKENS,
    seed: int = 0,
) -> dict[int, Float[np.ndarray, "r d"]]:
    """Inputs of the MLPs of some blocks, for tokens of images; empty without batches.

    Args:
        batches: images in [-1, 1]; see ``vmoe.passes``.
        most: number of tokens to keep, beside those of one batch: if there are more, a sample, the
            same in each block.
        seed: seed of the sample.
    """
    program = _mlp_inputs(model, _dense_blocks(model.config, blocks))
    random = np.random.default_rng(seed)
    kept: dict[int, Float[np.ndarray, "r d"]] = {}
    ranks = np.empty(0)  # the tokens with the smallest random numbers are the sample
    for part in passes.run(program, batches, model.placement):
        rows = {i: rearrange(x, "b n d -> (b n) d") for i, x in part.outputs.items()}
        old, new = len(ranks), len(next(iter(rows.values())))
        ranks = np.concatenate([ranks, random.random(new)])
        chosen = np.sort(np.argsort(ranks)[:most])
        ranks, first = ranks[chosen], chosen[chosen < old]
        for i, x in rows.items():
            added = x[chosen[len(first) :] - old]
            kept[i] = np.concatenate([kept[i][first], added]) if old else added
    return kept


@models.compiled
def _mlp_inputs(
    model: ViT, blocks: tuple[int, ...], batch: Batch
) -> tuple[dict[int, Float[Array, "b n d"]], None]:
    found = {}
    every = model.run_blocks(jnp.asarray(batch.images), valid=batch.valid)
    for i, (tokens, outputs) in enumerate(every):
        if i in blocks:
            found[i] = model.blocks[i].norm2(tokens + outputs.attention)
    return model.placement.replicate(found), None


def logit_changes(config: ViTConfig, moe: MoEConfig, start: UpcyclingStart = COPIES) -> list[str]:
    """Reasons why a model's logits change when some of its MLPs become the experts of such layers.

    Empty if they stay the same, up to rounding, for images of the config's size.

    Args:
        moe: config of each new MoE layer.
    """
    return start.logit_changes(config, moe)


def _dense_blocks(config: ViTConfig, blocks: Blocks) -> tuple[int, ...]:
    """The numbers of the blocks, each of which must be dense."""
    if isinstance(blocks, str):
        blocks = models.block_numbers(blocks, config.depth)
    chosen = tuple(sorted(set(blocks)))
    NOT_EMPTY.check(blocks=chosen)
    for block in chosen:
        require(0 <= block < config.depth, f"use 0 to {config.depth - 1}", blocks=block)
        require(block not in config.sparse_blocks, "this block is sparse already", blocks=block)
    return chosen
