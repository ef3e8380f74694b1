"""MoE layers in any Flax NNX model: selected modules become experts.

A module that acts on the last axis (a linear layer, a 1x1 convolution, an MLP of these) is replaced
by an MoE layer. By default its experts start as copies of the module, the combine weights are
normalized over a token's experts, and there are slots for every choice. So the outputs of the model
do not change until it is trained.
"""

from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from vmoe.config import AnyRouter, MoEConfig, TokenChoice, replace
from vmoe.errors import UsageError, require
from vmoe.nn.experts import Copies
from vmoe.nn.experts.copies import check_expert, on_rows
from vmoe.nn.gates import Linear
from vmoe.nn.keys import InitKeys
from vmoe.nn.moe import MoE
from vmoe.trees import path_name

Select = type | tuple[type, ...] | Callable[[tuple[Any, ...], nnx.Module], bool]
"""A type, several types, or a function (path, module) -> bool that selects modules."""


def moefy(
    model: nnx.Module,
    *,
    select: Select,
    num_experts: int = 8,
    k: int | None = None,
    capacity_factor: float | None = None,
    experts: Callable[[nnx.Module], Sequence[nnx.Module]] | None = None,
    gate: Callable[[int, int], nnx.Module] | None = None,
    router: AnyRouter | None = None,
    width: int | None = None,
    seed: int | jax.Array = 0,
) -> nnx.Module:
    """A copy of a model in which each selected module is replaced by an ``MoE`` layer.

    The root module is never replaced. Selected modules inside a selected one stay part of it. A
    module that occurs several times in the model is replaced by one shared layer.

    Args:
        model: unchanged; the copy shares its arrays.
        select: the modules to replace; paths are tuples such as ("blocks", 0, "mlp").
        num_experts: number of copies.
        k: experts per token of the default router; 2 if None.
        capacity_factor: of the default router: an expert has s * k * capacity_factor / e slots for
            s tokens. If None, it has s slots: no choice is dropped, and every expert computes s
            rows.
        experts: makes other experts from a selected module, a module for each: for example modules
            that add a part of their own to it, which stays one for all. They act on the last axis.
        gate: makes the gate of a layer from its width and its number of experts; if None, it is
            linear, without a bias.
        router: its config; if None, token choice with normalized weights and without noise.
        width: size of the last axis that selected modules act on, if it cannot be inferred from
            their linear layers.
        seed: seed of the linear gates.

    Raises:
        UsageError: no module is selected; a selected module contains a convolution that is not
            1x1, or does not act on the last axis; a router is given with k or a factor, or reads
            more than tokens.

    >>> model = nnx.Sequential(nnx.Linear(4, 8, rngs=nnx.Rngs(0)), nnx.relu)
    >>> sparse = moefy(model, select=nnx.Linear, num_experts=2)
    >>> sparse(jnp.ones((3, 4))).shape
    (3, 8)
    """
    for name, value in {"k": k, "capacity_factor": capacity_factor}.items():
        own = value is None or router is None
        require(own, f"the router has its own {name}: leave it out", **{name: value})
    if router is None:
        router = TokenChoice(k=k or 2, noise_std=0.0, normalize_weights=True, dropless=True)
        if capacity_factor is not None:
            router = replace(router, capacity_factor=capacity_factor, dropless=False)
    inputs = f"it reads {', '.join(router.takes)} for each token, which the model does not give"
    require(not router.takes, inputs, router=type(router).__name__)
    rngs = InitKeys(seed)

    def sparse(path: tuple[Any, ...], module: nnx.Module) -> nnx.Module | None:
        by_type = isinstance(select, type | tuple)
        if not (isinstance(module, select) if by_type else select(path, module)):
            return None
        d, spatial = _signature(path_name(path), module, width)
        if experts is None:
            made, e = Copies([module] * num_experts, spatial=spatial), num_experts
        else:
            made = list(experts(module))
            e = len(made)
        config = MoEConfig(num_experts=e, router=router)
        return MoE(made, _gate(gate, d, config, rngs), router)

    copy = nnx.clone(model, graph=True)  # a module can be in several places
    if not _replace(copy, (), sparse, {}):
        raise UsageError(f"select: no module inside the {type(model).__name__} matches")
    return copy


def _gate(
    make: Callable[[int, int], nnx.Module] | None, width: int, config: MoEConfig, rngs: InitKeys
) -> nnx.Module | None:
    """The gate of a layer; None for a router that reads no logits."""
    if make is not None:
        return make(width, config.num_experts)
    kind = config.router.kind
    require(config.router.logits_per != "slot", f"a {kind} router needs one: give gate", gate=None)
    return Linear(width, 0, config, rngs=rngs) if config.router.learned else None


def _replace(
    parent: Any,
    path: tuple[Any, ...],
    new: Callable[[tuple[Any, ...], nnx.Module], nnx.Module | None],
    seen: dict[int, nnx.Module],
) -> int:
    """Replaces modules below one, and returns how many.

    Args:
        new: the replacement of a module at a path; None to keep it.
        seen: the result for each module so far, by its identity.
    """
    count = 0
    for name, child in list(nnx.iter_children(parent, graph=True)):
        if not isinstance(child, nnx.Module):
            continue
        if id(child) not in seen:
            replacement = new((*path, name), child)
            seen[id(child)] = child if replacement is None else replacement
            if replacement is None:
                count += _replace(child, (*path, name), new, seen)
        if seen[id(child)] is not child:
            if isinstance(name, int):
                parent[name] = seen[id(child)]
            else:
                setattr(parent, name, seen[id(child)])
            count += 1
    return count


def _signature(name: str, module: nnx.Module, width: int | None) -> tuple[int, int]:
    """The width of a selected module's input, and the spatial axes that its convolutions need."""
    check_expert(name, module)
    inside = [part for _, part in nnx.iter_modules(module, graph=True)]
    convolutions = [part for part in inside if isinstance(part, nnx.Conv)]
    for convolution in convolutions:
        _check_convolution(name, convolution)
    spatial = max((len(part.kernel_size) for part in convolutions), default=0)
    linear = [part for part in inside if isinstance(part, nnx.Linear | nnx.Conv)]
    widths = dict.fromkeys(part.in_features for part in linear) if width is None else [width]
    fit = [d for d in widths if _acts_on_last_axis(module, d, spatial)]
    if len(fit) != 1:
        _check_one_layer(name, module)
        raise UsageError(
            f"{name}: this {type(module).__name__} does not map rows of "
            f"{width or 'one width inferred from its linear layers'} to rows; give width, or "
            "select modules that act on the last axis"
        )
    return fit[0], spatial


def _check_one_layer(name: str, module: nnx.Module) -> None:
    """Checks that the variables of linear layers have no axis of layers in front."""
    for part in (part for _, part in nnx.iter_modules(module, graph=True)):
        shape = part.kernel.shape if isinstance(part, nnx.Linear) else ()
        if len(shape) == 3:
            raise UsageError(
                f"{name}: its kernels {shape} are those of {shape[0]} layers, made by nnx.vmap for "
                "nnx.scan: apply moefy to one layer, in the function that nnx.vmap calls"
            )


def _check_convolution(name: str, convolution: nnx.Conv) -> None:
    for field in ("kernel_size", "strides", "input_dilation", "kernel_dilation"):
        value = getattr(convolution, field)
        sizes = (value,) if isinstance(value, int) else value or ()
        if any(size != 1 for size in sizes):
            raise UsageError(f"{name}: a convolution with {field}={value} mixes pixels, use 1x1")
    if convolution.feature_group_count != 1:
        raise UsageError(
            f"{name}: a convolution with feature_group_count={convolution.feature_group_count} is "
            "not linear in all channels, use 1"
        )


def _acts_on_last_axis(module: nnx.Module, width: int, spatial: int) -> bool:
    """Whether the module maps rows (r, width) to rows (r, x), for more than one r."""
    graph, state = nnx.split(module, graph=True)
    for r in (2, 3):
        rows = jax.ShapeDtypeStruct((r, width), jnp.float32)
        try:
            out = jax.eval_shape(lambda s, x: on_rows(nnx.merge(graph, s), x, spatial), state, rows)
        except (TypeError, ValueError):
            return False
        if out.ndim != 2 or len(out) != r:
            return False
    return True
