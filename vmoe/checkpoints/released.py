"""The checkpoints that the authors of V-MoE published: read, written, and their parameters' names.

Shapes and axis orders are the same here; only the names differ. What names and shapes do not tell
is assumed as the authors have it.
"""

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.typing import ArrayLike

from vmoe import models
from vmoe.checkpoints import chunked, chunked_write, flax_names
from vmoe.checkpoints.assemble import Recipe
from vmoe.checkpoints.checksums import by_name
from vmoe.config import MoEConfig, ViTConfig
from vmoe.config.fields import require
from vmoe.errors import UsageError
from vmoe.nn.gates.linear import LinearGate
from vmoe.nn.gates.soft import SoftGate
from vmoe.nn.vit import ViT

_NAMES = [  # prefix of a path here -> prefix of the published name; the first match wins
    (r"patches/embed", "embedding"),
    (r"class_token", "cls"),
    (r"positions/embedding", "Encoder/posembed_input/pos_embedding"),
    (r"blocks/(\d+)/norm1", r"Encoder/encoderblock_\1/LayerNorm_0"),
    (r"blocks/(\d+)/norm2", r"Encoder/encoderblock_\1/LayerNorm_1"),
    (r"blocks/(\d+)/attention", r"Encoder/encoderblock_\1/SelfAttention"),
    (r"blocks/(\d+)/mlp/router", r"Encoder/encoderblock_\1/Moe/Router"),
    (r"blocks/(\d+)/mlp/experts/up", r"Encoder/encoderblock_\1/Moe/Mlp/Dense_0"),
    (r"blocks/(\d+)/mlp/experts/down", r"Encoder/encoderblock_\1/Moe/Mlp/Dense_1"),
    (r"blocks/(\d+)/mlp/up", r"Encoder/encoderblock_\1/Mlp/Dense_0"),
    (r"blocks/(\d+)/mlp/down", r"Encoder/encoderblock_\1/Mlp/Dense_1"),
    (r"norm", "Encoder/encoder_norm"),
    (r"attention_pool/probe", "MapHead/probe"),
    (r"attention_pool/attention", "MapHead/MultiHeadDotProductAttention"),
    (r"attention_pool/norm", "MapHead/LayerNorm"),
    (r"attention_pool/mlp/up", "MapHead/Mlp/Dense_0"),
    (r"attention_pool/mlp/down", "MapHead/Mlp/Dense_1"),
    (r"head/pre_logits", "pre_logits"),
    (r"head/classes", "head"),
]


ASSUMED = MoEConfig(capacity_factor=4.0, transfer_dtype="bfloat16")
"""Of sparse blocks; 4.0 is the authors' capacity factor for evaluation."""

PUBLISHED = {"gelu": "tanh", "norm_epsilon": 1e-6, "fc_norm": False, "pre_norm": False}
UNTOLD = {"pooling": "patch_mean", "positions": "none"}  # read back as something else

_KERNELS = {LinearGate: "dense/kernel", SoftGate: "mu"}  # of a gate


def released_names(model: ViT) -> dict[tuple[str | int, ...], str]:
    """The published name of each parameter of a model, by its path.

    Args:
        model: may be abstract.

    Raises:
        UsageError: the published models have no such parameter.
    """
    params = nnx.to_flat_state(nnx.state(model, nnx.Param))
    return {path: _released_name(model, path) for path, _ in params}


def _released_name(model: ViT, path: tuple[str | int, ...]) -> str:
    ours = "/".join(str(part) for part in path)
    if path[2:] == ("mlp", "router", "kernel"):
        gate = model.blocks[path[1]].mlp.router
        ours = f"blocks/{path[1]}/mlp/router/{_KERNELS[type(gate)]}"
    for start, theirs in _NAMES:
        if re.match(start + "(/|$)", ours):
            return re.sub("^" + start, theirs, ours)
    raise UsageError(f"{ours}: the published models have no such parameter")


def assign(model: ViT, arrays: Mapping[str, ArrayLike]) -> None:
    """Replaces a model's parameters by published arrays.

    Args:
        arrays: by published name.

    Raises:
        UsageError: an array is missing, unexpected or of another shape; the model is unchanged.
    """
    params = nnx.state(model, nnx.Param)
    names = {name: path for path, name in released_names(model).items()}
    missing, extra = sorted(names.keys() - arrays), sorted(arrays.keys() - names)
    if missing or extra:
        raise UsageError(f"arrays missing: {missing or 'none'}, left over: {extra or 'none'}")
    flat = dict(nnx.to_flat_state(params))
    for name, path in names.items():
        ours, theirs = flat[path][...].shape, jnp.shape(arrays[name])
        if ours != theirs:
            raise UsageError(f"{name}: shape {theirs}, the model's is {ours}")
        flat[path] = flat[path].replace(jnp.asarray(arrays[name], jnp.float32))
    nnx.update(model, nnx.from_flat_state(list(flat.items())))


def recipe(prefix: Path) -> Recipe:
    """How to read a checkpoint.

    Args:
        prefix: of its files, PREFIX.index and PREFIX.data-nnnnn-of-NNNNN.

    Raises:
        Failure: a file is missing, or the index is corrupt.
    """
    return Recipe(chunked.read(prefix), flax_names.rename, moe=ASSUMED)


def write(prefix: Path, config: ViTConfig, params: Mapping[str, Any], *, shards: int = 1) -> None:
    """Writes a model as a checkpoint that the authors' code can read.

    Args:
        prefix: of the paths of the files.
        params: as nested dicts.
        shards: number of data files, over which the experts are split.

    Raises:
        UsageError: the published models cannot be like this one, or a file cannot be written.
    """
    for field, value in PUBLISHED.items():
        if getattr(config, field) != value:
            raise UsageError(
                f"model.{field}={getattr(config, field)}: the published models have {value}, which "
                "their format cannot tell; use another format"
            )
    for field, value in UNTOLD.items():
        if getattr(config, field) == value:
            raise UsageError(
                f"model.{field}={value}, which the published format cannot tell; use another format"
            )
    require(shards >= 1, f"shards={shards}: use at least 1")
    arrays = by_name(params)
    names = released_names(models.build_abstract(config))
    chunked_write.write(
        prefix,
        {
            f"params/{name}": np.asarray(arrays["/".join(map(str, path))])
            for path, name in names.items()
        },
        shards=shards,
    )
