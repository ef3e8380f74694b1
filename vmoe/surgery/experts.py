"""Prunes, adds, merges or averages the experts of trained MoE layers.

The functions that change a model map (config, params) to (config, params). ``params`` can be any
tree with the structure of the parameters. A separate function first selects the experts to keep
(``most_loaded``, ``random_experts`` or ``largest_router_change``), so that the same selection can
be applied to parameters, moving averages and the moments of an optimizer.

The capacity factor does not change. An expert has s * k * capacity_factor / e slots, so pruning
gives each remaining expert more slots, and adding experts gives each fewer. A fixed ``capacity``
is a number of slots per expert and stays.

All raise a UsageError that names the block if it is not sparse, has no such expert, or has a soft
router; or if fewer experts than k would be left, or there are fewer than are to be kept.
"""

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax.traverse_util import flatten_dict, unflatten_dict
from jax.typing import ArrayLike
from jaxtyping import Array, Float

from vmoe.config import GatedMlpExpert, MoEConfig, ViTConfig, replace
from vmoe.errors import require
from vmoe.fields import at_least
from vmoe.surgery.params import (
    Params,
    Path,
    initial_values,
    is_mlp_of,
    with_noise,
    with_sparse_blocks,
)

Selection = dict[int, tuple[int, ...]]
"""Selected experts of each sparse block, by block number."""


def most_loaded(loads: Mapping[int, ArrayLike], num_experts: int) -> Selection:
    """The experts of each block with the largest load.

    Args:
        loads: one number per expert for each block, such as the choices that it received.
        num_experts: number of experts to keep per block.

    >>> most_loaded({3: np.array([5, 0, 7, 1])}, 2)
    {3: (0, 2)}
    """
    return {block: _largest(load, num_experts, block) for block, load in loads.items()}


def random_experts(config: ViTConfig, num_experts: int, *, seed: int = 0) -> Selection:
    """Random experts of each sparse block; a baseline.

    Args:
        num_experts: number of experts to keep per block.
    """
    return {
        block: _largest(
            np.random.default_rng((seed, block)).random(moe.num_experts), num_experts, block
        )
        for block, moe in config.moe_blocks.items()
    }


def largest_router_change(
    config: ViTConfig, params: Params, earlier: Params, num_experts: int
) -> Selection:
    """The experts of each sparse block whose router vectors grew most, in Euclidean norm.

    Prune the others after fine-tuning: their norms have the smallest signed change.

    Args:
        params: fine-tuned parameters.
        earlier: parameters before fine-tuning, of the same model; only the routers are read.
        num_experts: number of experts to keep per block.

    Source: "A Provably Effective Method for Pruning Experts in Fine-tuned Sparse
    Mixture-of-Experts" (arXiv 2405.16646). The paper's code keeps the router columns of pruned
    experts, so choices of these experts are lost; ``prune_experts`` removes the columns.
    """
    now, before = flatten_dict(params), flatten_dict(earlier)
    kept = {}
    for block in config.sparse_blocks:
        _check(config, block, ())
        path = _gate(block)
        require(
            path in before and before[path].shape == now[path].shape,
            f"block {block}: the earlier parameters have no router of this shape; give the "
            "parameters of the same model before fine-tuning",
        )
        change = [np.linalg.norm(np.asarray(arrays[path]), axis=0) for arrays in (now, before)]
        kept[block] = _largest(change[0] - change[1], num_experts, block)
    return kept


def prune_experts(
    config: ViTConfig,
    params: Params,
    kept: Mapping[int, Sequence[int]],
    *,
    k: int | None = None,
) -> tuple[ViTConfig, Params]:
    """Removes all experts but the kept ones, with their router columns.

    A token that chose a removed expert now chooses among the remaining ones; the gates are
    normalized over these.

    Args:
        kept: for each block to prune, the experts to keep, in their new order; other blocks are
            unchanged.
        k: new number of experts per token in these blocks, for routers with a k; None keeps it.
    """
    for block, experts in kept.items():
        _check(config, block, experts)
        require(len(set(experts)) == len(experts), f"block {block}: an expert is kept twice")
    return _regroup(config, params, _singles(kept), k)


def add_experts(
    config: ViTConfig,
    params: Params,
    copied: Mapping[int, Sequence[int]],
    *,
    new_columns: bool = False,
    noise_std: float = 0.0,
    seed: int = 0,
    initial: Params | None = None,
    k: int | None = None,
) -> tuple[ViTConfig, Params]:
    """Adds copies of experts after the existing ones.

    With copies of all experts, copied router columns and twice the k, the outputs stay the same if
    no choice is dropped. A ``BiasBalanced`` router also needs the sigmoid and normalized weights:
    unnormalized weights double, and a softmax halves the scores but not the biases.

    Args:
        copied: experts of each block to copy, in order; an expert may be given several times.
        new_columns: give the copies initial router columns, instead of copied ones.
        noise_std: standard deviation of the noise that is added to each copy's kernels, relative
            to the kernel's standard deviation.
        seed: seed of the noise and of the new columns, as for ``models.build``.
        initial: a tree of the new model to take new columns from, instead of the seed.
        k: new number of experts per token in these blocks, for routers with a k; None keeps it.
    """
    at_least(0).check(noise_std=noise_std)
    layers = config.moe_blocks
    for block, experts in copied.items():
        _check(config, block, experts)
    everything = {block: (*range(layers[block].num_experts), *copied[block]) for block in copied}
    new_config, params = _regroup(config, params, _singles(everything), k)

    arrays, key = flatten_dict(params), jax.random.key(seed)
    for i, (path, block) in enumerate(_of_blocks(arrays, copied)):
        old = layers[block].num_experts
        if noise_std > 0 and path[3] == "experts" and path[-1] == "kernel":
            noisy = with_noise(arrays[path][old:], noise_std, jax.random.fold_in(key, i))
            arrays[path] = arrays[path].at[old:].set(noisy)
    if new_columns:
        columns = {path: block for block in copied for path in _columns(layers[block], block)}
        fresh = initial_values(new_config, columns, seed=seed, initial=initial)
        for path, block in columns.items():
            old = layers[block].num_experts
            arrays[path] = arrays[path].at[:, old:].set(fresh[path][:, old:])
    return new_config, unflatten_dict(arrays)


def merge_experts(
    config: ViTConfig,
    params: Params,
    groups: Mapping[int, Sequence[Sequence[int]]],
    *,
    k: int | None = None,
) -> tuple[ViTConfig, Params]:
    """Replaces each group of experts by one, the mean of their parameters and router columns.

    Args:
        groups: for each block to merge, groups that contain every expert exactly once; an expert
            in a group of its own stays as it is.
        k: new number of experts per token in these blocks, for routers with a k; None keeps it.
    """
    for block, members in groups.items():
        experts = [expert for group in members for expert in group]
        _check(config, block, experts)
        require(
            all(members) and sorted(experts) == list(range(config.moe_blocks[block].num_experts)),
            f"block {block}: groups {[list(group) for group in members]} must contain each of its "
            f"{config.moe_blocks[block].num_experts} experts once",
        )
    return _regroup(config, params, groups, k)


def average_experts(
    config: ViTConfig, params: Params, blocks: Iterable[int] | None = None
) -> tuple[ViTConfig, Params]:
    """Replaces each MoE layer by a dense MLP, the mean of its experts; drops the routers.

    A model without dense blocks, whose config decides no MLP, gets those of the kind of its
    experts.

    Args:
        blocks: sparse blocks to make dense; all if None.
    """
    chosen = config.sparse_blocks if blocks is None else tuple(blocks)
    checked = {block: _checked(config, block) for block in chosen}
    if len(config.sparse_blocks) == config.depth:
        gated = any(isinstance(moe.experts, GatedMlpExpert) for moe in checked.values())
        config = replace(config, mlp="gated" if gated else "plain")
    for block, moe in checked.items():
        require(
            is_mlp_of(config, moe.experts),
            f"block {block} has experts {moe.experts.kind} unlike the model's MLPs: their mean "
            "cannot replace them",
        )
        require(
            not moe.shared_experts,
            f"block {block} has shared experts, which are added to the others: one MLP cannot "
            "replace both",
        )
        scale = moe.routed_scale
        one_scale = f"block {block} has routed_scale={scale}, which an MLP has not: use 1"
        require(scale == 1, one_scale)
    arrays = flatten_dict(params)
    for path, _ in list(_of_blocks(arrays, chosen)):
        value = arrays.pop(path)
        if path[3] == "experts":
            arrays[*path[:3], *path[4:]] = jnp.mean(jnp.asarray(value), axis=0)
    left = {block: moe for block, moe in config.moe_blocks.items() if block not in chosen}
    return with_sparse_blocks(config, left), unflatten_dict(arrays)


def _largest(values: ArrayLike, num_experts: int, block: int) -> tuple[int, ...]:
    """The indices of the largest values, ascending; ties go to the first."""
    values = np.asarray(values)
    require(
        values.ndim == 1 and 1 <= num_experts <= len(values),
        f"block {block}: cannot keep {num_experts} of {values.size} experts",
    )
    return tuple(sorted(np.argsort(-values, kind="stable")[:num_experts].tolist()))


def _checked(config: ViTConfig, block: int) -> MoEConfig:
    """The layer of a block; checks that it is sparse and its experts are of one kind."""
    moe = config.moe_of(block)
    require(moe is not None, f"block {block} is not sparse: choose from {config.sparse_blocks}")
    assert moe is not None
    require(
        moe.router.logits_per != "slot",
        f"block {block} has router {moe.router.kind}, whose slots are trained together: its "
        "experts cannot be pruned, added, merged or averaged",
    )
    require(
        moe.experts.alike,
        f"block {block} has experts {moe.experts.kind}, which are of different kinds: they cannot "
        "be pruned, added, merged or averaged",
    )
    return moe


def _check(config: ViTConfig, block: int, experts: Sequence[int]) -> None:
    """Checks also that the gate of a block has a column for each expert, and these experts."""
    moe = _checked(config, block)
    gate = moe.gate_config
    require(
        gate is not None,
        f"block {block} has router {moe.router.kind}, which has no gate: its experts cannot be "
        "pruned, added or merged",
    )
    assert gate is not None
    require(
        bool(gate.columns),
        f"block {block} has gate {gate.kind}, whose parameters are not one column for each expert: "
        "its experts cannot be pruned, added or merged",
    )
    for expert in experts:
        require(
            0 <= expert < moe.num_experts,
            f"block {block} has no expert {expert}: it has {moe.num_experts}, counted from 0",
        )


def _regroup(
    config: ViTConfig,
    params: Params,
    groups: Mapping[int, Sequence[Sequence[int]]],
    k: int | None,
) -> tuple[ViTConfig, Params]:
    """Makes expert i of a block the mean of the experts in ``groups[block][i]``."""
    layers = dict(config.moe_blocks)
    for block, members in groups.items():
        layers[block] = _regrouped(layers[block], members, k)
    arrays = flatten_dict(params)
    for path, block in _of_blocks(arrays, groups):
        is_column = path in _columns(layers[block], block)
        # A state without an axis, such as a coefficient, belongs to the layer.
        if is_column or (path[3] in ("experts", "state") and np.ndim(arrays[path])):
            axis = -1 if is_column else 0
            arrays[path] = _means(jnp.asarray(arrays[path]), groups[block], axis)
    return with_sparse_blocks(config, layers), unflatten_dict(arrays)


def _regrouped(moe: MoEConfig, groups: Sequence[Sequence[int]], k: int | None) -> MoEConfig:
    """The layer's config; a new expert has the shares of all its members."""
    router = moe.router
    without = f"router {router.kind} has no experts per token; leave k out"
    require(k is None or router.has("k"), without, k=k)
    changes: dict[str, Any] = {} if k is None else dict(k=k)
    if router.shares:
        changes["shares"] = tuple(sum(router.shares[i] for i in group) for group in groups)
    hot = min(moe.exchange.hot_experts, len(groups))
    return replace(moe, num_experts=len(groups), router=changes, exchange=dict(hot_experts=hot))


def _means(
    values: Float[Array, "*x"], groups: Sequence[Sequence[int]], axis: int
) -> Float[Array, "*y"]:
    """The mean of each group along an axis; for a group of one, exactly its member."""
    if all(len(group) == 1 for group in groups):
        return jnp.take(values, jnp.asarray([expert for (expert,) in groups]), axis)
    means = [jnp.take(values, jnp.asarray(group), axis).mean(axis) for group in groups]
    return jnp.stack(means, axis)


def _singles(experts: Mapping[int, Sequence[int]]) -> dict[int, list[tuple[int]]]:
    return {block: [(expert,) for expert in chosen] for block, chosen in experts.items()}


def _of_blocks(arrays: Mapping[Path, Any], blocks: Iterable[int]) -> list[tuple[Path, int]]:
    """The parameter paths of the MoE layers of some blocks, with the block number."""
    chosen = set(blocks)
    return [(path, path[1]) for path in arrays if path[2:3] == ("mlp",) and path[1] in chosen]


def _columns(moe: MoEConfig, block: int) -> list[Path]:
    """The gate's parameters with one column for each expert."""
    gate = moe.gate_config
    return [] if gate is None else [_gate(block, name) for name in gate.columns]


def _gate(block: int, name: str = "kernel") -> Path:
    return ("blocks", block, "mlp", "gate", name)
