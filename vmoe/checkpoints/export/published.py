"""Writes checkpoints that the V-MoE authors' code reads; ``chunked.py`` describes the container.

Shapes and axis orders are the same here; only the names differ (``flax_names.py``).
"""

import dataclasses
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import msgpack
import numpy as np
from flax.traverse_util import unflatten_dict

from vmoe.checkpoints.chunked import (
    ARRAY,
    INDEX,
    MARK,
    PIECE,
    SLICE_ND,
    VERSION,
    Box,
    data_paths,
    index_path,
    leaves,
    volume,
)
from vmoe.checkpoints.flax_names import published_name
from vmoe.checkpoints.infer import IMAGE_SIZE
from vmoe.config import ViTConfig
from vmoe.config.experts import MlpExpert
from vmoe.config.gates import LinearGate, SlotGate
from vmoe.errors import UsageError, writing
from vmoe.fields import at_least
from vmoe.host.signals import unfinished
from vmoe.trees import by_name
from vmoe.workdir.layout import replacing

PUBLISHED = {
    "activation": "gelu_tanh",
    "mlp": "plain",
    "norm": "layer",
    "norm_epsilon": 1e-6,
    "position_resampling": "bilinear",
    "fc_norm": False,
    "pre_norm": False,
    "attention_norm": False,
    "head_dim": None,
    "qk_rms": False,
    "attention_sink": False,
    "registers": 0,
    "rotary": None,
}
NOT_REPRESENTABLE = {"pooling": "patch_mean", "positions": "none"}  # read back as something else


def write(prefix: Path, config: ViTConfig, params: Mapping[str, Any], *, shards: int = 1) -> None:
    """Writes a model as a checkpoint that the authors' code can read.

    Args:
        shards: number of data files, over which the experts are split.
    """
    _check_fields(config)
    for block, moe in config.moe_blocks.items():
        if moe.router.initial_state(1) or moe.router.normalized or not moe.router.learned:
            raise UsageError(
                f"block {block} has router {moe.router.kind}: layers of published checkpoints have "
                "a gate, no state, and weights that are not normalized; use another format"
            )
        if moe.shared_experts:
            raise UsageError(
                "published checkpoints have no shared experts; use another format",
                **{"model.moe.shared_experts": moe.shared_experts, "block": block},
            )
        if moe.routed_scale != 1:
            raise UsageError(
                "published checkpoints have no routed scale; use another format",
                **{"model.moe.routed_scale": moe.routed_scale, "block": block},
            )
        own = MlpExpert(), SlotGate() if moe.router.logits_per == "slot" else LinearGate()
        given = moe.experts, moe.gate_config
        for what, mine, stored in zip(("experts", "gate"), given, own, strict=True):
            if mine != stored:
                raise UsageError(
                    f"published checkpoints have no {what} other than {stored.kind} with its "
                    "defaults; use another format",
                    **{f"model.moe.{what}.kind": mine.kind if mine else None, "block": block},
                )
    at_least(1).check(shards=shards)
    arrays = {
        f"params/{published_name(path, config)}": np.asarray(value)
        for path, value in by_name(params).items()
    }
    write_arrays(prefix, arrays, shards=shards)


def _check_fields(config: ViTConfig) -> None:
    """Checks that a reader finds the fields of the dense parts, which no file stores."""
    if config.num_heads * config.dim_per_head == config.width:
        config = dataclasses.replace(config, head_dim=None)
    for field, value in PUBLISHED.items():
        if getattr(config, field) != value:
            raise UsageError(
                f"published checkpoints do not store this field, and are read with {value}; use "
                "another format",
                **{f"model.{field}": getattr(config, field)},
            )
    for field, value in NOT_REPRESENTABLE.items():
        if getattr(config, field) == value:
            raise UsageError(
                "a published checkpoint cannot represent it; use another format",
                **{f"model.{field}": value},
            )
    size = IMAGE_SIZE // config.patch_size * config.patch_size
    if config.positions == "sincos2d" and config.image_size != size:
        raise UsageError(
            "published checkpoints do not store the image size of models with fixed positions, "
            f"which is read as {size}; use another format",
            **{"model.image_size": config.image_size, "model.positions": config.positions},
        )


def write_arrays(prefix: str | Path, arrays: Mapping[str, np.ndarray], *, shards: int = 1) -> None:
    """Writes a new checkpoint; the index is written last.

    Args:
        arrays: arrays by name; the parts of a name are joined by "/".
        shards: number of data files. Each array is split over all of them along its first axis if
            its length is a multiple of their number; otherwise it is in the smallest file.
    """
    paths = [index_path(prefix), *data_paths(prefix, shards)]
    for path in paths:
        if path.exists():
            raise UsageError(f"{path}: it exists; use another prefix")
    tree = unflatten_dict({name: name for name in arrays}, sep="/")
    contents: list[list[tuple[str, np.ndarray, Box]]] = [[] for _ in range(shards)]
    sizes, files = [0] * shards, dict[str, dict[Box, int]]()
    for number, (name, _) in enumerate(leaves(tree)):
        array = arrays[name]
        boxes = _split(array.shape, shards)
        smallest = sizes.index(min(sizes))
        files[name] = dict(
            zip(boxes, range(shards) if len(boxes) > 1 else [smallest], strict=False)
        )
        for box, file in files[name].items():
            contents[file].append((str(number), array, box))
            sizes[file] += volume(box) * array.dtype.itemsize
    with writing(prefix), unfinished(*paths):
        index_path(prefix).parent.mkdir(parents=True, exist_ok=True)
        for path, content in zip(paths[1:], contents, strict=True):
            _write_data(path, content)
        index = _index(tree, arrays, files)
        with replacing(index_path(prefix)) as temporary:
            whole = {"shard_count": shards, "index": index, "version": VERSION}
            temporary.write_bytes(_packed(whole))


def _packed(value: Any) -> bytes:
    packed: Any = msgpack.packb(value)
    return packed


def _split(shape: tuple[int, ...], shards: int) -> list[Box]:
    """The slices of an array, one for all data files or one for each."""
    whole = tuple((0, n) for n in shape)
    if not math.prod(shape) or not shape or shape[0] % shards:
        return [whole] if math.prod(shape) else []
    rows = shape[0] // shards
    return [((i * rows, (i + 1) * rows), *whole[1:]) for i in range(shards)]


def _index(tree: Any, arrays: Mapping[str, np.ndarray], files: dict[str, dict[Box, int]]) -> Any:
    if isinstance(tree, dict):
        return {key: _index(branch, arrays, files) for key, branch in tree.items()}
    array, boxes = arrays[tree], files[tree]
    shaped = _packed((array.shape, array.dtype.name, False, {}))
    entry = _packed((shaped, [_pack_box(box) for box in boxes], list(boxes.values())))
    return msgpack.ExtType(INDEX, entry)


def _pack_box(box: Box) -> bytes:
    return _packed([_packed((start, stop, None)) for start, stop in box])


def _write_data(path: Path, content: list[tuple[str, np.ndarray, Box]]) -> None:
    packer: Any = msgpack.Packer()
    with replacing(path) as temporary, temporary.open("wb") as file:
        file.write(packer.pack_map_header(len(content) + 1))
        file.write(packer.pack(MARK) + packer.pack(True))
        for key, array, box in content:
            pieces = _pieces(array[(*(slice(*each) for each in box), ...)])
            slices = [[pieces, msgpack.ExtType(SLICE_ND, _pack_box(box))]]
            file.write(packer.pack(key) + packer.pack(slices))


def _pieces(array: np.ndarray) -> list[msgpack.ExtType]:
    flat = np.ascontiguousarray(array).reshape(-1)
    step = PIECE // flat.dtype.itemsize
    return [
        msgpack.ExtType(
            ARRAY, _packed((part.shape, part.dtype.name, part.astype(part.dtype).tobytes()))
        )
        for part in (flat[i : i + step] for i in range(0, flat.size, step))
    ]
