"""Makes a stored model from a family of weights, whose arrays have other names and layouts."""

from collections.abc import Iterable

import numpy as np

from vmoe import models
from vmoe.checkpoints.arrays import FLOATS
from vmoe.checkpoints.family import HALF, Family, Pixels
from vmoe.checkpoints.infer import Shapes, count_blocks, infer_config
from vmoe.checkpoints.stored import StoredModel
from vmoe.class_names import class_names
from vmoe.config import ViTConfig
from vmoe.errors import Failure, UsageError, listed, naming, require
from vmoe.trees import nested

IMAGENET = {1000: "imagenet_1k", 21_843: "imagenet_21k"}  # by number of classes
NAMED = 5  # parameters in a message
POSITIONS = "positions/embedding"
SCALES = ("/attention/out/scale", "/mlp/down/scale")  # ends of the paths of layer scale


def assemble(family: Family) -> StoredModel:
    """Reads a model."""
    model = outline(family)
    arrays = family.arrays
    params: dict[str, np.ndarray] = {}
    with np.errstate(over="ignore", invalid="ignore"):  # the result is checked
        for name, array in arrays.read([x for x in arrays.infos if x not in model.origin.unused]):
            for path, transform in family.rename(name, array.shape).items():
                params[path] = np.array(transform(array), np.float32, order="C")
        for whole, halves in _halves(params).items():
            params[whole] = np.concatenate([params.pop(half) for half in halves], axis=-1)
        for path, info in models.abstract_params(model.config).items():
            params.setdefault(path, np.zeros(info.shape, np.float32))  # a bias that is left out
        _fold_scales(params)
        if family.pixels != HALF:
            _fold_pixels(params, family.pixels)
    if wrong := [path for path, values in params.items() if not np.isfinite(values).all()]:
        raise Failure(f"{arrays.path}: {wrong[0]} has values that are NaN or infinite")
    if model.config.positions == "learned":
        _fold_register_positions(params, model.config)
        if model.config.has_class_token:
            _add_class_position(params, model.config)
    return model._replace(params=nested(params))


def outline(family: Family) -> StoredModel:
    """The model in files, with the shapes of its parameters; no array is read."""
    with naming(family.arrays.path):
        shapes, unused = _shapes(family)
        own = {path: shape for path, shape in shapes.items() if not path.endswith(SCALES)}
        config = family.config or infer_config(own, family.given, family.moe)
        check_shapes(own, config, left_out=family.left_out)
        _check_scales(shapes, config.depth)
    names, assumed = family.class_names, []
    if family.config is None:
        droppers = (x for x in config.moe_blocks.values() if x.router.can_drop)
        if moe := next((x for x in droppers if not x.router.dropless), None):
            assumed += [
                f"k={moe.router.k}, priority=order, images_per_group="
                f"{moe.router.images_per_group}, exchange.dtype={moe.exchange.dtype}",
                f"capacity_factor={moe.router.capacity_factor}, {family.capacity_source}",
            ]
        if config.positions != "learned" and "positions" not in family.given:
            assumed.append(f"positions={config.positions}, image_size={config.image_size}")
        names, about_names = _named(names, config.num_classes)
        assumed += about_names
    preprocessing, about_images = family.prepared(config.image_size)
    return StoredModel(
        config=config,
        params=nested(models.abstract_params(config)),
        class_names=names,
        preprocessing=preprocessing,
        step=family.step,
        origin=family.origin._replace(assumed=(*assumed, *about_images), unused=unused),
        loss=family.loss,
    )


def shapes_in(family: Family, name: str) -> Shapes | None:
    """The parameters in an array of a file, with their shapes; None if the name is unknown.

    Raises:
        UsageError: an array of this name cannot have such a shape.
    """
    info = family.arrays.infos[name]
    same_shape = np.broadcast_to(np.zeros((), info.dtype), info.shape)  # takes no memory
    try:
        parts = family.rename(name, info.shape)
        return {path: transform(same_shape).shape for path, transform in parts.items()}
    except KeyError:
        return None
    except UsageError:
        raise
    except (ValueError, IndexError) as error:
        reason = str(error).strip().splitlines()[0]
        raise UsageError(f"{name} has shape {info.shape}: {reason}") from None


def _shapes(family: Family) -> tuple[Shapes, tuple[str, ...]]:
    """The shapes of all parameters, and the names of arrays that are not used."""
    shapes, arrays = dict[str, tuple[int, ...]](), dict[str, str]()
    unused, unknown = [], []
    for name, info in family.arrays.infos.items():
        parts = shapes_in(family, name)
        if parts is None:
            unknown.append(name)
            continue
        if not parts:
            unused.append(name)
        elif info.dtype.name not in FLOATS:
            raise UsageError(f"{name} has dtype {info.dtype}: parameters are floats")
        if twice := sorted(parts.keys() & shapes.keys()):
            raise UsageError(f"two arrays are {twice[0]}; the second is {name}")
        shapes |= parts
        arrays |= dict.fromkeys(parts, name)
    for whole, halves in _halves(shapes).items():
        if whole in shapes:
            half = next(arrays[x] for x in halves if x in arrays)
            raise UsageError(f"two arrays are {whole}: {arrays[whole]} and {half}")
        found = [f"{arrays[x]} {shapes[x]}" if x in shapes else "a missing one" for x in halves]
        first, second = (shapes.pop(half, None) for half in halves)
        if first is None or first != second:
            here = " and ".join(found)
            raise UsageError(f"{whole} is in two arrays of equal shapes, here {here}")
        shapes[whole] = (*first[:-1], 2 * first[-1])
    if unknown:
        raise UsageError(f"not a model that can be represented; it has {listed(unknown, NAMED)}")
    return shapes, tuple(unused)


def _halves(paths: Iterable[str]) -> dict[str, list[str]]:
    """The paths of the two halves of each parameter that is stored in two arrays."""
    wholes = dict.fromkeys(whole for path in paths if (whole := whole_path(path)) != path)
    return {whole: [f"{whole}/{i}" for i in range(2)] for whole in wholes}


def whole_path(path: str) -> str:
    """The path of the parameter that an array is, or is a half of; see ``Rename``.

    >>> whole_path("blocks/0/mlp/up/kernel/1")
    'blocks/0/mlp/up/kernel'
    """
    return path[:-2] if path[-2:] in ("/0", "/1") else path


def _named(names: tuple[str, ...], classes: int) -> tuple[tuple[str, ...], list[str]]:
    """The names of all classes, and the assumptions about them."""
    if not classes:
        return (), ["no classes, since no array is a head"]
    if len(names) == classes and len(set(names)) == classes:
        return names, []
    if classes in IMAGENET:
        return class_names(IMAGENET[classes]), [f"class names of {IMAGENET[classes]}"]
    if len(names) == classes:  # some are equal
        return tuple(f"{name} ({i})" for i, name in enumerate(names)), ["numbers in class names"]
    return tuple(map(str, range(classes))), ["class names 0, 1, ..."]


def check_shapes(shapes: Shapes, config: ViTConfig, *, left_out: tuple[str, ...] = ()) -> None:
    """Checks that a model of the config has parameters of these shapes.

    Args:
        left_out: ends of the paths that may be missing.
    """
    _check_sizes(shapes, config)
    expected = {path: leaf.shape for path, leaf in models.abstract_params(config).items()}
    missing = [p for p in expected if p not in shapes and not p.endswith(left_out)]
    extra = [path for path in shapes if path not in expected]
    if missing or extra:
        raise UsageError(
            f"not a model that can be represented; missing: {listed(missing, NAMED) or 'nothing'}, "
            f"unexpected: {listed(extra, NAMED) or 'nothing'}"
        )
    for path, shape in shapes.items():
        others = _other_positions(expected[path], config) if path == POSITIONS else ()
        if shape != expected[path] and shape not in others:
            raise UsageError(f"{path} has shape {shape}, but {expected[path]} fits the others")


def _check_sizes(shapes: Shapes, config: ViTConfig) -> None:
    """Checks the sizes that a config declares against the arrays, before anything is built."""
    if empty := [path for path, shape in shapes.items() if 0 in shape]:
        raise UsageError(f"{empty[0]} has shape {shapes[empty[0]]}: it has no values")
    if (depth := count_blocks(shapes)) != config.depth:
        raise UsageError(f"there are parameters of {depth} blocks", **{"model.depth": config.depth})
    largest = max((n for shape in shapes.values() for n in shape), default=0)
    names = ("patch_size", "width", "num_heads", "num_classes", "pre_logits", "registers")
    sizes = {f"model.{name}": getattr(config, name) for name in names}
    for i, moe in config.moe_blocks.items():
        if moe.experts.alike:  # a list names each of its experts
            sizes[f"moe.num_experts of block {i}"] = moe.num_experts
    for name, size in sizes.items():
        require(size is None or size <= largest, "no parameter has such an axis", **{name: size})


def _check_scales(shapes: Shapes, depth: int) -> None:
    """Checks that the factors of a layer's outputs exist in all blocks or in none."""
    scaled = {path.removesuffix("/scale") for path in shapes if path.endswith(SCALES)}
    layers = {path.split("/", 2)[2] for path in scaled}
    every = {f"blocks/{i}/{layer}" for layer in layers for i in range(depth)}
    for path in sorted(scaled | every):
        shape, kernel = shapes.get(f"{path}/scale"), shapes.get(f"{path}/kernel", ())
        if shape is None:
            raise UsageError(f"the factors of {path} are missing")
        if shape != kernel[-1:]:
            raise UsageError(f"the factors of {path} have shape {shape}")


def _other_positions(expected: tuple[int, ...], config: ViTConfig) -> list[tuple[int, ...]]:
    """The shapes of positions with none for the class token, and with those of registers."""
    one, n, width = expected
    return [(one, n + more, width) for more in (-config.has_class_token, config.registers)]


def _fold_scales(params: dict[str, np.ndarray]) -> None:
    """Multiplies the factors of a layer's outputs into its kernel and bias."""
    for path in [path for path in params if path.endswith(SCALES)]:
        factors, layer = params.pop(path), path.removesuffix("/scale")
        for part in ("kernel", "bias"):
            params[f"{layer}/{part}"] *= factors


def _fold_pixels(params: dict[str, np.ndarray], pixels: Pixels) -> None:
    """Folds (pixels - mean) / std into the patch embedding, for pixels in [-1, 1] instead.

    With x in [-1, 1], (x / 2 + 0.5 - mean) / std = x * 0.5 / std + (0.5 - mean) / std.
    """
    mean, std = (np.asarray(each, np.float64)[:, None] for each in pixels)
    kernel = params["patches/embed/kernel"].astype(np.float64)
    bias = params["patches/embed/bias"] + (kernel * ((0.5 - mean) / std)).sum((0, 1, 2))
    params["patches/embed/kernel"] = (kernel * (0.5 / std)).astype(np.float32)
    params["patches/embed/bias"] = bias.astype(np.float32)


def _fold_register_positions(params: dict[str, np.ndarray], config: ViTConfig) -> None:
    """Adds the positions of registers, if the file has any, to the registers."""
    positions, first = params[POSITIONS], int(config.has_class_token)
    last = first + config.registers
    grid = (config.image_size // config.patch_size) ** 2
    if config.registers and positions.shape[1] == grid + last:
        params["registers"] += positions[:, first:last]
        params[POSITIONS] = np.delete(positions, slice(first, last), axis=1)


def _add_class_position(params: dict[str, np.ndarray], config: ViTConfig) -> None:
    """Gives the class token a position embedding of zeros if the file has none for it."""
    positions = params[POSITIONS]
    if positions.shape[1] == (config.image_size // config.patch_size) ** 2:
        params[POSITIONS] = np.pad(positions, ((0, 0), (1, 0), (0, 0)))
