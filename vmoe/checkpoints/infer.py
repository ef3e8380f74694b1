"""The config of a model from the names and shapes of its parameters."""

import math
import re
from collections.abc import Mapping
from typing import Any

from vmoe.config import MoEConfig, Soft, ViTConfig
from vmoe.errors import UsageError

Shapes = Mapping[str, tuple[int, ...]]  # by path
MAX_DEPTH = 256  # blocks; a model of more would take minutes to build
IMAGE_SIZE = 224  # pixels, if no parameter and no file specifies it


def infer_config(shapes: Shapes, given: Mapping[str, Any], moe: MoEConfig) -> ViTConfig:
    """The config of a model whose parameters have these shapes.

    Args:
        given: fields that do not follow from shapes, such as ``activation``; ``image_size`` is used
            only if there are no learned positions, or if those fit several grids.
        moe: config of the MoE layers, apart from the number of experts and a soft router.
    """
    patches = _shape(shapes, "patches/embed/kernel", 4)
    query = _shape(shapes, "blocks/0/attention/query/kernel", 3)
    if patches[0] != patches[1] or patches[2] != 3:
        raise UsageError(f"patches/embed/kernel has shape {patches}: patches are squares in RGB")
    depth = count_blocks(shapes)
    mlp_dim = _mlp_dim(shapes, depth)
    kernels = ("gate/kernel", "experts/up/kernel")  # a file may lack one of them
    layers = {
        i: _moe(shapes, i, moe)
        for i in range(depth)
        if any(f"blocks/{i}/mlp/{kernel}" in shapes for kernel in kernels)
    }
    distinct = set(layers.values())
    pooling = "class_token" if "class_token" in shapes else "mean"
    if _has(shapes, "attention_pool"):
        pooling = "attention"
    fields: dict[str, Any] = dict(
        patch_size=patches[0],
        width=patches[3],
        depth=depth,
        mlp_dim=mlp_dim,
        mlp=_mlp(shapes, mlp_dim),
        num_heads=query[1],
        head_dim=query[2] if query[1] * query[2] != query[0] else None,
        num_classes=_shape(shapes, "head/classes/kernel", 2)[1]
        if _has(shapes, "head/classes")
        else 0,
        pre_logits=_shape(shapes, "head/pre_logits/kernel", 2)[1]
        if _has(shapes, "head/pre_logits")
        else None,
        pooling=pooling,
        registers=_shape(shapes, "registers", 3)[1] if "registers" in shapes else 0,
        pre_norm=_has(shapes, "pre_norm"),
        attention_norm=_has(shapes, "attention/norm"),
        attention_sink=_has(shapes, "attention/sink"),
        qk_norm=_has(shapes, "attention/query_ln") or _has(shapes, "attention/key_ln"),
        sparse_blocks=tuple(layers),
        moe=distinct.pop() if len(distinct) == 1 else tuple(layers.values()) or moe,
    )
    fields |= given
    return ViTConfig(**fields | _positions(shapes, patches[0], fields))


def count_blocks(shapes: Shapes) -> int:
    """The number of blocks whose parameters have these paths; every one must have some."""
    found = {match[1] for name in shapes if (match := re.match(r"blocks/(\w+)/", name))}
    if len(found) > MAX_DEPTH:
        raise UsageError(f"it has {len(found)} blocks, at most {MAX_DEPTH} are supported")
    missing = [i for i in range(len(found)) if str(i) not in found]
    if missing:
        raise UsageError(f"block {missing[0]} of {len(found)} has no parameters")
    return len(found)


def _has(shapes: Shapes, part: str) -> bool:
    """Whether there is any parameter of a part, so that those that are missing are named."""
    return any(f"/{part}/" in f"/{name}/" for name in shapes)


def _shape(shapes: Shapes, name: str, *axes: int) -> tuple[int, ...]:
    """The shape of a parameter, with one of these numbers of axes."""
    if name not in shapes:
        raise UsageError(f"parameter {name} is missing")
    if len(shapes[name]) not in axes:
        expected = " or ".join(map(str, axes))
        raise UsageError(f"{name} has shape {shapes[name]}: {expected} axes are expected")
    return shapes[name]


def _mlp_dim(shapes: Shapes, depth: int) -> int:
    """The hidden width, which all blocks must share."""
    found = {}
    for i in range(depth):
        for layer, axes in (("mlp/down", 2), ("mlp/experts/down", 3)):
            name = f"blocks/{i}/{layer}/kernel"
            if name in shapes:
                found[_shape(shapes, name, axes)[-2]] = name
    if not found:
        raise UsageError("parameter blocks/0/mlp/down/kernel is missing")
    if len(found) > 1:
        names = ", ".join(f"{name} {dim}" for dim, name in found.items())
        raise UsageError(f"the blocks have MLPs of different hidden widths: {names}")
    return next(iter(found))


def _mlp(shapes: Shapes, mlp_dim: int) -> str:
    """The kind of the dense MLPs, by the first one; the shapes of all are checked later."""
    if _has(shapes, "mlp/norm"):
        return "gated_norm"
    first = next((shapes[name] for name in shapes if name.endswith("/mlp/up/kernel")), ())
    return "gated" if first[-1:] == (2 * mlp_dim,) else "plain"


def _moe(shapes: Shapes, block: int, moe: MoEConfig) -> MoEConfig:
    router = _shape(shapes, f"blocks/{block}/mlp/gate/kernel", 2, 3)
    experts = _shape(shapes, f"blocks/{block}/mlp/experts/up/kernel", 3)[0]
    if len(router) == 3:  # a vector for each slot
        return MoEConfig(num_experts=experts, router=Soft(capacity=router[2]))
    return MoEConfig(**vars(moe) | {"num_experts": experts})


def _positions(shapes: Shapes, patch_size: int, fields: Mapping[str, Any]) -> dict[str, Any]:
    """The kind of positions, and the side of the images."""
    if "positions/embedding" not in shapes:
        size = fields.get("image_size", IMAGE_SIZE // patch_size * patch_size)
        return {"positions": fields.get("positions", "sincos2d"), "image_size": size}
    n = _shape(shapes, "positions/embedding", 3)[1]
    first = fields["pooling"] in ("class_token", "patch_mean")
    # The class token may have no position, and registers may have some. What is no number of
    # registers is refused with the config.
    registers = fields["registers"] if isinstance(fields["registers"], int) else 0
    patches = (n - first, n, n - first - registers)
    sizes = {math.isqrt(x) * patch_size for x in patches if x > 0 and math.isqrt(x) ** 2 == x}
    if not sizes and n and math.isqrt(n - 1) ** 2 == n - 1:
        raise UsageError(f"class_token is missing: one of the {n} positions/embedding is its own")
    if not sizes:
        raise UsageError(f"positions/embedding has {n} positions: this is not a square grid")
    if len(sizes) > 1:
        given, known = fields.get("image_size"), sizes
        if not (sizes := {size for size in known if size == given}):
            raise UsageError(
                f"positions/embedding has {n} positions: with {registers} registers, images may be "
                f"of {' or '.join(map(str, sorted(known)))} pixels, but image_size is {given!r:.40}"
                "; name the size in config.json (img_size in model_args of timm)"
            )
    return {"positions": "learned", "image_size": sizes.pop()}
