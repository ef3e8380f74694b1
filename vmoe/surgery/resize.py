"""Parameters fitted to another model: resampled positions, another head, a partial load.

``fit`` reports what happened to every parameter, and raises an error for new or dropped parameters
that the target config does not require. Changing k, the capacity or the priority changes only the
config, no parameter.
"""

import dataclasses
from collections.abc import Collection, Iterator, Mapping
from typing import Any, NamedTuple

import jax.numpy as jnp
from flax.traverse_util import flatten_dict, unflatten_dict
from jaxtyping import Array, Float

from vmoe.config import ViTConfig
from vmoe.config.model import Resampling
from vmoe.errors import UsageError, listed
from vmoe.nn.positions import resample
from vmoe.surgery.params import Params, Path, initial_values, wanted_shapes
from vmoe.trees import path_name

ARITHMETIC = ("activation", "norm", "norm_epsilon", "qk_rms", "rotary")
FIXED = (*ARITHMETIC, "fc_norm", "pooling", "positions")
"""Fields of the config that training depends on and that the shapes of parameters do not show."""

PARTS = "head_dim", "registers", "mlp", "pre_norm", "attention_norm", "qk_norm", "attention_sink"
"""Parts of blocks that no named model sets, and that weights have or have not."""

SIZES = ("patch_size", "depth", "width", "mlp_dim", "num_heads", *PARTS, "sparse_blocks")
"""Fields of the config that the shapes of parameters show, named where parameters do not fit."""

NAMED = 2  # parameters of a kind in an error
Shapes = Mapping[str, tuple[int, ...]]  # by path

POSITIONS: Path = ("positions", "embedding")
CLASSES: Path = ("head", "classes")


class Changes(NamedTuple):
    """The changes that ``fit`` made, as paths of parameters.

    Every parameter of the target is in one of loaded, resized and new; every given parameter is in
    one of loaded, resized and dropped. A parameter with a new shape is in new and in dropped.

    Attributes:
        loaded: unchanged parameters.
        new: parameters with the target's initial values.
        dropped: parameters that the target does not have.
        resized: parameters that were resampled to the target's grid.
    """

    loaded: list[str]
    new: list[str]
    dropped: list[str]
    resized: list[str]


def fit(
    config: ViTConfig,
    params: Params,
    target: ViTConfig,
    *,
    new_head: bool = False,
    partial: bool | Collection[str] = False,
    seed: int = 0,
    initial: Params | None = None,
) -> tuple[Params, Changes]:
    """Fits parameters to the model of another config, and reports what happened to each.

    Positions are resampled if the grid of patches differs, as ``config`` says: the fitted model
    gives the logits that the given one gives for images of the new size. The head is new if the
    number of classes or the pre-logits differ. Any other new or dropped parameter is an error,
    unless ``partial`` allows it.

    Args:
        params: nested dicts, unchanged.
        new_head: make the head new even if it fits, as for other classes of the same number.
        partial: the parameters that may be new or dropped: True for all, which also allows another
            ``fc_norm``, ``pooling`` and ``positions``; or paths such as ``["blocks/3/mlp"]``, for
            the parameters at or below them.
        seed: seed of the new parameters, as for ``models.build``.
        initial: a tree of the target to take the new parameters from, instead of the seed; zeros
            for the moments of an optimizer.

    Raises:
        UsageError: parameters would be new or dropped that neither the target nor ``partial``
            allows; or the two configs differ in a field of ``FIXED``.
    """
    differing = [
        field
        for field in (ARITHMETIC if partial is True else FIXED)
        if getattr(target, field) != getattr(config, field)
    ]
    if differing:
        wanted, trained = (dict(_values(each, differing)) for each in (target, config))
        ours, theirs = (
            ", ".join(f"{path}={value}" for path, value in each.items())
            for each in (wanted, trained)
        )
        error = UsageError(f"{ours}: the parameters were trained with {theirs}; use that")
        raise error.remedied_by(**trained)
    given = flatten_dict(params)
    wanted = wanted_shapes(target, initial)
    other_head = (
        new_head
        or config.num_classes != target.num_classes
        or config.pre_logits != target.pre_logits
    )
    fits = [
        path
        for path, shape in wanted.items()
        if path in given and given[path].shape == shape and not (other_head and path[:2] == CLASSES)
    ]
    resized = [POSITIONS] if _resizable(given.get(POSITIONS), wanted.get(POSITIONS)) else []
    new = [path for path in wanted if path not in fits and path not in resized]
    dropped = [path for path in given if path not in fits and path not in resized]
    allowed = ["head"] if other_head else []
    if not isinstance(partial, bool):
        allowed += [partial] if isinstance(partial, str) else partial
    if partial is not True:
        _refuse(
            _outside(new, allowed),
            _outside(dropped, allowed),
            {path_name(path): leaf.shape for path, leaf in given.items()},
            {path_name(path): shape for path, shape in wanted.items()},
            _sizes(config, target),
        )

    values = initial_values(target, new + resized, seed=seed, initial=initial)
    values |= {path: given[path] for path in fits}
    for path in resized:
        values[path] = resize_positions(
            jnp.asarray(given[path]),
            values[path],
            grid=_grid(config),
            new_grid=_grid(target),
            method=config.position_resampling,
        )
    names = [[path_name(path) for path in paths] for paths in (fits, new, dropped, resized)]
    return unflatten_dict({path: values[path] for path in wanted}), Changes(*names)


def resize_positions(
    embedding: Float[Array, "1 n d"],
    initial: Float[Array, "1 m d"],
    *,
    grid: tuple[int, int],
    new_grid: tuple[int, int],
    method: Resampling,
) -> Float[Array, "1 m d"]:
    """Resamples learned positions to another grid of patches.

    The vector of the class token is kept. If only ``initial`` has one, that is used; if only
    ``embedding`` has one, it is dropped. The number of vectors shows whether there is one.

    Args:
        embedding: the class token's vector, if any, then one vector per patch of ``grid`` (i, j).
        method: see ``ViTConfig.position_resampling``.
    """
    old, new = embedding.shape[1] - grid[0] * grid[1], initial.shape[1] - new_grid[0] * new_grid[1]
    places = jnp.asarray(embedding)[0, old:].reshape(*grid, -1)
    if grid != new_grid:
        places = resample(places, *new_grid, method)
    first = embedding[:, :old] if old == new else initial[:, :new]
    return jnp.concatenate([first, places.reshape(1, -1, places.shape[-1])], axis=1)


def _values(config: ViTConfig, fields: Collection[str]) -> Iterator[tuple[str, Any]]:
    """The paths and values of fields, and for a nested config those of its own fields."""
    for field in fields:
        value = getattr(config, field)
        if dataclasses.is_dataclass(value):
            yield from ((f"model.{field}.{name}", each) for name, each in vars(value).items())
        else:
            yield f"model.{field}", value


def _grid(config: ViTConfig) -> tuple[int, int]:
    side = config.image_size // config.patch_size
    return side, side


def _resizable(given: Any, wanted: tuple[int, ...] | None) -> bool:
    """Whether both are learned positions of the same width, but differ in number."""
    if given is None or wanted is None:
        return False
    return given.shape[1] != wanted[1] and given.shape[2] == wanted[2]


def _outside(paths: list[Path], allowed: list[str]) -> list[str]:
    """The paths that are not at or below an allowed one."""
    names = map(path_name, paths)
    return [name for name in names if not any(f"{name}/".startswith(f"{a}/") for a in allowed)]


def _refuse(new: list[str], dropped: list[str], given: Shapes, wanted: Shapes, sizes: str) -> None:
    """Raises an error that names what does not fit: shapes first, then what only one side has.

    Args:
        new: parameters of the target that are not given, and may not be new.
        dropped: given parameters that the target does not have, and may not be dropped.
    """
    if not new and not dropped:
        return
    reshaped = [name for name in new if name in given]
    shapes = [
        f"{name} is {_by(given[name])} in the weights and {_by(wanted[name])} in the model"
        for name in reshaped
    ]
    parts = [sizes] if sizes else []
    parts += [
        f"{what} {listed(names, NAMED)}"
        for what, names in (
            ("other shapes:", shapes),
            ("only in the model:", [name for name in new if name not in reshaped]),
            ("only in the weights:", [name for name in dropped if name not in reshaped]),
        )
        if names
    ]
    kept = sum(given.get(name) == shape for name, shape in wanted.items())
    raise UsageError(
        f"the parameters do not fit the model: {'; '.join(parts)}; use a "
        f"model of the same sizes, or a partial load (partial=True of vmoe.surgery.fit), which "
        f"takes {kept} of the model's {len(wanted)} parameters from the weights"
    ).remedied_by(partial=True)


def _by(shape: tuple[int, ...]) -> str:
    return " x ".join(map(str, shape)) or "a scalar"


def _sizes(config: ViTConfig, target: ViTConfig) -> str:
    """The sizes in which the weights and the model differ; empty if they do not."""
    of_weights, of_model = (
        {name: getattr(each, name) for name in SIZES} | {"head_dim": each.dim_per_head}
        for each in (config, target)
    )
    if config.sparse_blocks == target.sparse_blocks:
        for sizes, each in ((of_weights, config), (of_model, target)):
            sizes["num_experts"] = tuple(moe.num_experts for moe in each.moe_blocks.values())
    names = [name for name, size in of_weights.items() if size != of_model[name]]
    weights, model = (
        ", ".join(f"{name} {each[name]}" for name in names) for each in (of_weights, of_model)
    )
    return f"the weights have {weights}, and the model has {model}" if names else ""
