"""Writes collected routing as one safetensors file, for other programs and languages."""

import contextlib
import json
import struct
from collections.abc import Iterable, Iterator
from pathlib import Path

import numpy as np
from jaxtyping import Int

from vmoe.analysis.collect import Collected
from vmoe.errors import UsageError
from vmoe.workdir.layout import replacing

MEANING = {
    "experts": "i32 [tokens, layers, k]: the expert of each choice; -1 for none",
    "positions": "i32 [tokens, layers, k]: position in the expert's queue, from 0; -1 if dropped",
    "weights": "f32 [tokens, layers, k]: the combine weight of each choice; 0 if dropped",
    "gates": "f32 [tokens, layers, experts]: the weight of each expert for a token",
    "groups": "i32 [images, layers]: the group in which the tokens of an image competed",
    "logits": "f32 [images, classes]",
    "labels": "i32 [images, labels]: the classes; -1 where an image has fewer",
    "indices": "i32 [images]: the index of the image in its split, from 0; missing if unknown",
    "tokens": "token t is token t % tokens_per_image of image t // tokens_per_image; the class "
    "token, if the model has one, is the first, and registers come before the patches",
}
"""Descriptions of the arrays; the file's header also has ``layers``, the numbers of the blocks."""

_OF_TOKENS = {
    "gates": (np.float32, 0),
    "experts": (np.int32, -1),
    "positions": (np.int32, -1),
    "weights": (np.float32, 0),
}
"""Arrays with a token axis: their type, and the padding for blocks with fewer experts."""

_FORMATS = {np.dtype(np.int32): "I32", np.dtype(np.float32): "F32"}


def export(
    path: str | Path,
    parts: Iterable[Collected],
    indices: Iterator[Int[np.ndarray, "_"]] | None = None,
) -> Path:
    """Writes the routing of a data set; ``safetensors.numpy.load_file`` reads it.

    Memory is bounded by one batch. Layers with fewer experts or choices are padded, gates and
    weights with 0. Soft routers make no choices: the file has their gates alone.

    Args:
        path: the file to write; an existing one is replaced at the end.
        parts: as ``collect`` yields them.
        indices: for each part, the indices of its images in their split.

    Raises:
        UsageError: there is no image, or no sparse block.
        OSError: the file cannot be written.
    """
    path = Path(path)
    with replacing(path) as temporary, contextlib.ExitStack() as opened:
        spools, shapes, dtypes = {}, {}, {}
        layers: list[int] = []
        for part in parts:
            layers = list(part.blocks)
            known = [] if indices is None else [("indices", next(indices).astype(np.int32))]
            for name, array in [*_arrays(part), *known]:
                if name not in spools:
                    spool = temporary.with_name(f"{name}.spool").open("w+b")
                    spools[name] = opened.enter_context(spool)
                    shapes[name], dtypes[name] = [0, *array.shape[1:]], array.dtype
                shapes[name][0] += len(array)
                spools[name].write(array.tobytes())
        if not layers or not shapes["labels"][0]:
            raise UsageError("no image, or no sparse block: there is no routing to export")
        n = shapes["experts"][0] // shapes["labels"][0]
        header = _header(shapes, dtypes, layers, n)
        with temporary.open("wb") as file:
            file.write(struct.pack("<Q", len(header)) + header)
            for spool in spools.values():
                spool.seek(0)
                while block := spool.read(1 << 20):
                    file.write(block)
    return path


def _header(
    shapes: dict[str, list[int]], dtypes: dict[str, np.dtype], layers: list[int], n: int
) -> bytes:
    start, entries = 0, {}
    for name, shape in shapes.items():
        size = int(np.prod(shape, dtype=np.int64)) * dtypes[name].itemsize
        entries[name] = {
            "dtype": _FORMATS[dtypes[name]],
            "shape": shape,
            "data_offsets": [start, start + size],
        }
        start += size
    metadata = {**MEANING, "layers": json.dumps(layers), "tokens_per_image": str(n)}
    header = json.dumps({"__metadata__": metadata, **entries}).encode()
    return header + b" " * (-len(header) % 8)


def _arrays(part: Collected) -> Iterator[tuple[str, np.ndarray]]:
    blocks = list(part.blocks.values())
    if not blocks:
        return
    for name, (dtype, fill) in _OF_TOKENS.items():
        size, layers = max(getattr(block, name).shape[-1] for block in blocks), []
        for block in blocks:
            layer = getattr(block, name)
            if name == "experts":  # in a record, e stands for none
                layer = np.where(layer < block.gates.shape[-1], layer, fill)
            missing = size - layer.shape[-1]
            layers.append(np.pad(layer, ((0, 0), (0, 0), (0, missing)), constant_values=fill))
        stacked = np.stack(layers, axis=2).astype(dtype)
        b, n = stacked.shape[:2]
        yield name, stacked.reshape(b * n, *stacked.shape[2:])
    yield "groups", np.stack([block.groups for block in blocks], axis=1).astype(np.int32)
    yield "logits", part.logits.astype(np.float32)
    yield "labels", part.labels.astype(np.int32)
