"""Sparse upcycling: the MLPs of a trained dense model become the experts of a sparse one.

Every expert starts as a copy of its block's MLP, and the router as in a new model. If the combine
weights are normalized over a token's experts and no choice is dropped, the sparse model has the
same logits as the dense one until it is trained.

Source: "Sparse Upcycling: Training Mixture-of-Experts from Dense Checkpoints" (arXiv 2212.05055).
"""

from collections.abc import Iterable
from typing import Any

import jax
import jax.numpy as jnp
from flax.traverse_util import flatten_dict, unflatten_dict

from vmoe import models
from vmoe.config import MlpExpert, MoEConfig, TokenChoice, ViTConfig, replace
from vmoe.errors import require
from vmoe.fields import NOT_EMPTY, at_least
from vmoe.nn.patches import num_tokens
from vmoe.nn.vit import ViT
from vmoe.surgery.params import (
    Params,
    initial_values,
    is_mlp_of,
    wanted_shapes,
    with_noise,
    with_sparse_blocks,
)

Blocks = str | Iterable[int]
"""Blocks of a model: their numbers, or a name such as "every2" or "last2"."""


def upcycle(
    model: ViT,
    *,
    blocks: Blocks = "every2",
    num_experts: int = 8,
    noise_std: float = 0.0,
    seed: int = 0,
    **moe: Any,
) -> ViT:
    """A model in which experts replace some of the MLPs; it shares the other arrays.

    Args:
        model: a dense or sparse model; it does not change.
        blocks: every second block ("every2"), the last n of these ("last2"), or block numbers.
        noise_std: standard deviation of the noise that is added to each expert's kernels, relative
            to the kernel's standard deviation.
        seed: seed of the routers, as for ``models.build``, and of the noise.
        moe: other fields of ``MoEConfig``; see ``upcycled_layer`` for the defaults.

    Raises:
        UsageError: a block does not exist or is sparse already, fields are incompatible, the
            experts are not MLPs as in the model, or a layer is not the one in its config.

    >>> import vmoe
    >>> vmoe.upcycle(vmoe.create_model("vit_test"), num_experts=4).config.sparse_blocks
    (1, 3)
    """
    models.check_described(model)
    layer = upcycled_layer(model.config, num_experts=num_experts, **moe)
    config, params = upcycle_params(
        model.config,
        models.params_of(model),
        blocks=blocks,
        moe=layer,
        noise_std=noise_std,
        seed=seed,
    )
    return models.with_params(config, params, placement=model.placement)


def upcycled_layer(dense: ViTConfig, **fields: Any) -> MoEConfig:
    """The config of an upcycled layer of a dense model, with some fields changed.

    By default the experts have the dropout of the MLPs that they replace, and the router is a token
    choice that normalizes the weights of a token's experts, without a capacity unless the fields of
    the router have one. Several devices need a capacity; with a capacity factor of e / k no choice
    is dropped either.
    """
    given = fields.get("router", {})
    limited = isinstance(given, dict) and {"dropless", "capacity", "capacity_factor"} & given.keys()
    router = TokenChoice(normalize_weights=True, dropless=not limited)
    return replace(MoEConfig(router=router, experts=MlpExpert(dropout=dense.dropout)), **fields)


def upcycle_params(
    config: ViTConfig,
    params: Params,
    *,
    blocks: Blocks,
    moe: MoEConfig,
    noise_std: float = 0.0,
    seed: int = 0,
    initial: Params | None = None,
) -> tuple[ViTConfig, Params]:
    """``upcycle`` for parameters as nested dicts.

    Args:
        initial: a tree of the new model to take the routers from, instead of the seed; zeros for
            the moments of an optimizer.
    """
    at_least(0).check(noise_std=noise_std)
    require(
        is_mlp_of(config, moe.experts),
        "the experts start as copies of MLPs: use mlp, with the hidden width and the activation of "
        "the model",
        **{"experts.kind": moe.experts.kind},
    )
    chosen = _dense_blocks(config, blocks)
    target = with_sparse_blocks(config, config.moe_blocks | dict.fromkeys(chosen, moe))
    key, arrays = jax.random.key(seed), {}
    for i, (path, value) in enumerate(flatten_dict(params).items()):
        if path[0] != "blocks" or path[1] not in chosen or path[2] != "mlp":
            arrays[path] = value
            continue
        experts = jnp.repeat(jnp.asarray(value)[None], moe.num_experts, axis=0)
        if noise_std > 0 and path[-1] == "kernel":
            experts = with_noise(experts, noise_std, jax.random.fold_in(key, i))
        arrays[*path[:3], "experts", *path[3:]] = experts
    wanted = wanted_shapes(target, initial)
    routers = [path for path in wanted if path not in arrays]
    arrays |= initial_values(target, routers, seed=seed, initial=initial)
    return target, unflatten_dict({path: arrays[path] for path in wanted})


def logit_changes(config: ViTConfig, moe: MoEConfig, *, noise_std: float = 0.0) -> list[str]:
    """Reasons why a model's logits change when some of its MLPs become the experts of such layers.

    Empty if they stay the same, up to rounding, for images of the config's size.

    Args:
        moe: config of each new MoE layer.
    """
    reasons = []
    router = moe.router
    if router.logits_per == "slot":
        reasons.append(f"with router {router.kind} the experts get mixtures of tokens")
    elif not router.can_drop:
        reasons.append(f"with router {router.kind} the combine weights of a token do not sum to 1")
    else:
        of_all = router.k == moe.num_experts and router.weights_are_gates
        if not router.normalized and not of_all:
            reasons.append("the combine weights of a token are not normalized")
        if not _has_room(moe, router.k, num_tokens(config)):
            reasons.append("choices beyond the capacity are dropped")
    if moe.routed_scale != 1:
        reasons.append(f"the outputs of the experts are scaled (routed_scale={moe.routed_scale})")
    if moe.shared_experts:
        reasons.append("a shared expert is added, whose parameters are new")
    if noise_std > 0:
        reasons.append(f"noise is added to the experts (noise_std={noise_std})")
    if moe.transfer_dtype == "bfloat16" and config.dtype != "bfloat16":
        reasons.append("rows are rounded to bfloat16 (transfer_dtype)")
    return reasons


def _has_room(moe: MoEConfig, k: int, tokens: int) -> bool:
    """Whether an expert has a slot for every token of a group, for groups of any size."""
    if moe.router.capacity is not None:
        return moe.router.capacity >= moe.router.images_per_group * tokens
    factor = min(moe.router.capacity_factor, moe.router.in_evaluation().capacity_factor)
    return moe.router.dropless or (not moe.router.shares and factor * k >= moe.num_experts)


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
