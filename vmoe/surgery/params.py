"""Parameters of a ViT as nested dicts: shapes, initial values, the sparse blocks of the config.

A tree is the result of ``vmoe.models.params_of``, or any tree of the same structure, such as the
moments of an optimizer.
"""

from collections.abc import Iterable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
from flax.traverse_util import flatten_dict
from jaxtyping import Array, Float

from vmoe import models
from vmoe.config import MoEConfig, ViTConfig, replace
from vmoe.config.experts import Expert, GatedMlpExpert, MlpExpert
from vmoe.trees import nested

Params = dict[Any, Any]
"""Nested dicts of arrays."""

Path = tuple[str | int, ...]
"""The path of a parameter in a tree: ("blocks", 1, "mlp", "up", "kernel")."""


def shapes(config: ViTConfig) -> dict[Path, tuple[int, ...]]:
    """The shapes of the parameters of a config's model, by path, in the order of the paths."""
    arrays = flatten_dict(nested(models.abstract_params(config)))
    return {path: arrays[path].shape for path in sorted(arrays)}


def wanted_shapes(config: ViTConfig, initial: Params | None) -> dict[Path, tuple[int, ...]]:
    """The shapes of a config's parameters.

    Args:
        initial: as for ``initial_values``. If it is a tree of an optimizer's moments, which has no
            state of routers, the result has none either.
    """
    given = None if initial is None else flatten_dict(initial)
    return {
        path: shape
        for path, shape in shapes(config).items()
        if given is None or path in given or "state" not in path
    }


def initial_values(
    config: ViTConfig, paths: Iterable[Path], *, seed: int, initial: Params | None
) -> dict[Path, Any]:
    """Initial values of some parameters, by path.

    Args:
        seed: as for ``models.build``, which gives the same values; other values are not computed.
        initial: a tree to take the values from, instead of the seed.
    """
    paths = list(paths)
    if initial is not None:
        arrays = flatten_dict(initial)
        return {path: arrays[path] for path in paths}

    def draw() -> list[Any]:
        arrays = flatten_dict(models.params_of(models.build(config, seed=seed)))
        return [arrays[path] for path in paths]

    return dict(zip(paths, jax.jit(draw)() if paths else [], strict=True))


def with_sparse_blocks(config: ViTConfig, layers: Mapping[int, MoEConfig]) -> ViTConfig:
    """The config with exactly these sparse blocks, each with its MoE config."""
    moes = tuple(moe for _, moe in sorted(layers.items()))
    shared = moes[0] if len(set(moes)) == 1 else moes
    return replace(config, sparse_blocks=tuple(sorted(layers)), moe=shared or MoEConfig())


def is_mlp_of(config: ViTConfig, experts: Expert) -> bool:
    """Whether experts are MLPs like the dense ones of the model."""
    return (
        isinstance(experts, MlpExpert if config.mlp == "plain" else GatedMlpExpert)
        and config.mlp != "gated_norm"
        and experts.mlp_dim in (None, config.mlp_dim)
        and experts.activation in (None, config.activation)
    )


def with_noise(
    stacked: Float[Array, "e *x"], noise_std: float, key: jax.Array
) -> Float[Array, "e *x"]:
    """Kernels of experts plus independent Gaussian noise.

    Args:
        noise_std: standard deviation of the noise, relative to that of the expert's kernel.
    """
    axes = tuple(range(1, stacked.ndim))
    scale = noise_std * jnp.std(stacked, axis=axes, keepdims=True)
    return stacked + scale * jax.random.normal(key, stacked.shape, stacked.dtype)
