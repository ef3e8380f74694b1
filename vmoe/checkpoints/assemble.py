"""From the arrays of a file, under other names and in other layouts, to a model's parameters."""

import functools
from collections.abc import Callable, Mapping, Sequence
from types import MappingProxyType
from typing import Any, NamedTuple

import jax
import numpy as np
from flax.traverse_util import unflatten_dict

from vmoe import models
from vmoe.checkpoints.arrays import FLOATS, ArrayFile, ArrayInfo
from vmoe.checkpoints.checksums import by_name
from vmoe.checkpoints.infer import count_blocks, infer_config
from vmoe.config import MoEConfig, ViTConfig, replace
from vmoe.errors import Failure, UsageError, listed, naming, require

LARGEST = 1000.0  # mean or std of pixels
NAMED = 5  # parameters in a message
SCALE = "scale:"  # before a path: a factor for the outputs of that linear layer
QKV_BIASES = ("/query/bias", "/key/bias", "/value/bias")  # ends of paths
PATCH_BIAS = "patches/embed/bias"

Rename = Callable[[str, np.ndarray], Mapping[str, np.ndarray]]
"""The parameters in an array of a file, by path; empty if it is of no use. Raises a KeyError if the
name is unknown."""


class Pixels(NamedTuple):
    """The normalisation of pixels in [0, 1] that weights expect: (pixels - mean) / std."""

    mean: Sequence[float]
    std: Sequence[float]


def checked_pixels(mean: Any, std: Any) -> Pixels:
    """The normalisation that a file declares.

    Raises:
        UsageError: the values are not three numbers each, or would overflow.
    """
    for name, values, least in (("mean", mean, -LARGEST), ("std", std, 1 / LARGEST)):
        triple = isinstance(values, list) and len(values) == 3
        if not triple or not all(type(x) in (int, float) and least <= x <= LARGEST for x in values):
            raise UsageError(
                f"{name} {values!r:.80} of the pixels: expected three numbers from {least:g} to "
                f"{LARGEST:g}"
            )
    return Pixels(mean, std)


HALF = Pixels((0.5, 0.5, 0.5), (0.5, 0.5, 0.5))
UNUSED_MOE = MoEConfig()  # a placeholder for families without sparse blocks


class Conversion(NamedTuple):
    """How a file becomes a model.

    Attributes:
        rename: gives the parameters in each array.
        given: fields of the config that do not follow from names and shapes.
        moe: config of sparse blocks, apart from the number of experts.
        pixels: folded into the patch embedding, so that the model takes pixels in [-1, 1].
        config: of the model, if the file has it; nothing is inferred then.
        left_out: ends of the paths of biases that such a model does not have; they are 0 here.
    """

    file: ArrayFile
    rename: Rename
    given: Mapping[str, Any] = MappingProxyType({})
    moe: MoEConfig = UNUSED_MOE
    pixels: Pixels = HALF
    config: ViTConfig | None = None
    left_out: tuple[str, ...] = ()


class Assembled(NamedTuple):
    """A model's config and parameters.

    Attributes:
        params: as nested dicts.
        unused: names of arrays in the file that the model has no use for.
    """

    config: ViTConfig
    params: dict[str, Any]
    unused: tuple[str, ...]


def paths_of(conversion: Conversion, name: str) -> dict[str, tuple[int, ...]] | None:
    """The parameters in an array of a file, with their shapes; None if the name is unknown.

    Raises:
        UsageError: the shape is not one that such an array can have.
    """
    info = conversion.file.infos[name]
    try:
        parts = conversion.rename(name, _stand_in(info))
    except KeyError:
        return None
    except UsageError:
        raise
    except (ValueError, IndexError) as error:
        reason = str(error).strip().splitlines()[0]
        raise UsageError(f"{name} has shape {info.shape}: {reason}") from None
    return {path: part.shape for path, part in parts.items()}


def infer(conversion: Conversion) -> tuple[ViTConfig, dict[str, list[str]]]:
    """The config of the model in a file, without reading its arrays, and each array's paths.

    Raises:
        UsageError: the file holds another kind of model; names the parameter.
    """
    with naming(conversion.file.path):
        return _infer(conversion)


def _infer(conversion: Conversion) -> tuple[ViTConfig, dict[str, list[str]]]:
    shapes: dict[str, tuple[int, ...]] = {}
    paths: dict[str, list[str]] = {}
    unknown = []
    for name in conversion.file.infos:
        parts = paths_of(conversion, name)
        if parts is None:
            unknown.append(name)
            continue
        if parts and conversion.file.infos[name].dtype.name not in FLOATS:
            dtype = conversion.file.infos[name].dtype
            raise UsageError(f"{name} has dtype {dtype}: parameters are floats")
        if twice := sorted(parts.keys() & shapes.keys()):
            raise UsageError(f"two arrays are {twice[0]}; the second is {name}")
        shapes |= parts
        paths[name] = list(parts)
    if unknown:
        raise UsageError(f"not a model that can be represented; it has {listed(unknown, NAMED)}")
    own = {path: shape for path, shape in shapes.items() if not path.startswith(SCALE)}
    config = conversion.config or infer_config(own, conversion.given, conversion.moe)
    check_shapes(own, config, left_out=conversion.left_out)
    _check_scales(shapes, config.depth)
    return config, paths


def assemble(conversion: Conversion) -> Assembled:
    """Reads a model.

    Raises:
        UsageError: the file holds another kind of model; names the parameter.
        Failure: the file is corrupt.
    """
    config, paths = infer(conversion)
    file = conversion.file
    params: dict[str, np.ndarray] = {}
    with np.errstate(over="ignore", invalid="ignore"):  # the result is checked
        for name, array in file.read([name for name, own in paths.items() if own]):
            for path, part in conversion.rename(name, array).items():
                params[path] = np.array(part, np.float32, order="C")
        for path, info in _expected(config).items():
            params.setdefault(path, np.zeros(info.shape, np.float32))  # a bias that is left out
        _fold_scales(params)
        if conversion.pixels != HALF:
            _fold_pixels(params, conversion.pixels)
    if wrong := [path for path, values in params.items() if not np.isfinite(values).all()]:
        raise Failure(f"{file.path}: {wrong[0]} has values that are NaN or infinite")
    if config.positions == "learned" and config.has_class_token:
        _add_class_position(params, config)
    unused = tuple(name for name, own in paths.items() if not own)
    return Assembled(config, nested(params), unused)


def nested(params: Mapping[str, Any]) -> dict[str, Any]:
    """Parameters by path as nested dicts, in which blocks have numbers as keys.

    >>> nested({"blocks/1/norm1/scale": 0})
    {'blocks': {1: {'norm1': {'scale': 0}}}}
    """
    return unflatten_dict(
        {
            tuple(int(part) if part.isdigit() else part for part in path.split("/")): value
            for path, value in params.items()
        }
    )


def _stand_in(info: ArrayInfo) -> np.ndarray:
    """An array of a shape that takes no memory."""
    return np.broadcast_to(np.zeros((), info.dtype), info.shape)


@functools.lru_cache(maxsize=32)
def _expected(config: ViTConfig) -> dict[str, jax.ShapeDtypeStruct]:
    """The parameters of a model by path. It traces one block of each kind: each takes 0.05 s."""
    layers = [config.moe_blocks.get(i) for i in range(config.depth)]  # None: dense
    kinds = list(dict.fromkeys(layers))
    small = replace(
        config,
        depth=len(kinds),
        sparse_blocks=tuple(i for i, kind in enumerate(kinds) if kind),
        moe=tuple(kind for kind in kinds if kind),
    )
    traced = by_name(models.params_of(models.build_abstract(small)))
    expected = {path: leaf for path, leaf in traced.items() if not path.startswith("blocks/")}
    for i, layer in enumerate(layers):
        start = f"blocks/{kinds.index(layer)}/"
        expected |= {
            f"blocks/{i}/{path.removeprefix(start)}": leaf
            for path, leaf in traced.items()
            if path.startswith(start)
        }
    return expected


def check_shapes(
    shapes: Mapping[str, tuple[int, ...]], config: ViTConfig, *, left_out: tuple[str, ...] = ()
) -> None:
    """Checks that a model of the config has parameters of these shapes.

    Args:
        left_out: ends of the paths that may be missing.

    Raises:
        UsageError: a parameter is missing, unexpected or of another shape.
    """
    _check_sizes(shapes, config)
    expected = {path: leaf.shape for path, leaf in _expected(config).items()}
    missing = [p for p in expected if p not in shapes and not p.endswith(left_out)]
    extra = [path for path in shapes if path not in expected]
    if missing or extra:
        raise UsageError(
            f"not a model that can be represented; missing: {listed(missing, NAMED) or 'nothing'}, "
            f"unexpected: {listed(extra, NAMED) or 'nothing'}"
        )
    for path, shape in shapes.items():
        if shape != expected[path] and not _lacks_class_position(path, shape, expected[path]):
            raise UsageError(f"{path} has shape {shape}, and {expected[path]} fits the others")


def _check_sizes(shapes: Mapping[str, tuple[int, ...]], config: ViTConfig) -> None:
    """Checks sizes that a config declares against those of arrays, before anything is built."""
    if empty := [path for path, shape in shapes.items() if 0 in shape]:
        raise UsageError(f"{empty[0]} has shape {shapes[empty[0]]}: it has no values")
    if (depth := count_blocks(shapes)) != config.depth:
        raise UsageError(f"there are parameters of {depth} blocks", **{"model.depth": config.depth})
    largest = max((n for shape in shapes.values() for n in shape), default=0)
    names = ("patch_size", "width", "mlp_dim", "num_heads", "num_classes", "pre_logits")
    sizes = {f"model.{name}": getattr(config, name) for name in names}
    sizes |= {f"moe.num_experts of block {i}": m.num_experts for i, m in config.moe_blocks.items()}
    for name, size in sizes.items():
        require(size is None or size <= largest, "no parameter has such an axis", **{name: size})


def _check_scales(shapes: Mapping[str, tuple[int, ...]], depth: int) -> None:
    """Checks that if a layer has factors for its outputs, so does that layer of every block."""
    scaled = {path.removeprefix(SCALE) for path in shapes if path.startswith(SCALE)}
    layers = {path.split("/", 2)[2] for path in scaled}
    every = {f"blocks/{i}/{layer}" for layer in layers for i in range(depth)}
    for path in sorted(scaled | every):
        shape, kernel = shapes.get(SCALE + path), shapes.get(f"{path}/kernel", ())
        if shape is None:
            raise UsageError(f"the factors of {path} are missing")
        if shape != kernel[-1:]:
            raise UsageError(f"the factors of {path} have shape {shape}")


def _lacks_class_position(path: str, shape: tuple[int, ...], expected: tuple[int, ...]) -> bool:
    one_less = (expected[0], expected[1] - 1, *expected[2:]) if len(expected) == 3 else ()
    return path == "positions/embedding" and shape == one_less


def _fold_scales(params: dict[str, np.ndarray]) -> None:
    """Multiplies factors of a layer's outputs into its kernel and bias."""
    for name in [name for name in params if name.startswith(SCALE)]:
        factors = params.pop(name)
        for part in ("kernel", "bias"):
            params[f"{name.removeprefix(SCALE)}/{part}"] *= factors


def _fold_pixels(params: dict[str, np.ndarray], pixels: Pixels) -> None:
    """Folds (pixels - mean) / std into the patch embedding, for pixels in [-1, 1] instead.

    With x in [-1, 1], (x / 2 + 0.5 - mean) / std = x * 0.5 / std + (0.5 - mean) / std.
    """
    mean, std = (np.asarray(each, np.float64)[:, None] for each in pixels)
    kernel = params["patches/embed/kernel"].astype(np.float64)
    bias = params["patches/embed/bias"] + (kernel * ((0.5 - mean) / std)).sum((0, 1, 2))
    params["patches/embed/kernel"] = (kernel * (0.5 / std)).astype(np.float32)
    params["patches/embed/bias"] = bias.astype(np.float32)


def _add_class_position(params: dict[str, np.ndarray], config: ViTConfig) -> None:
    """Gives the class token a position of zeros if the file has none for it."""
    positions = params["positions/embedding"]
    if positions.shape[1] == (config.image_size // config.patch_size) ** 2:
        params["positions/embedding"] = np.pad(positions, ((0, 0), (1, 0), (0, 0)))
