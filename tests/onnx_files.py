"""ONNX files with the names that PyTorch's export gives to a DINOv2 of transformers."""

from collections.abc import Callable, Mapping
from pathlib import Path
from types import MappingProxyType

import numpy as np
from safetensors.numpy import load_file


def field(number: int, *values: bytes | str | int) -> bytes:
    """Fields of a number in a message of Protocol Buffers; texts and messages as bytes."""
    found = b""
    for value in values:
        if isinstance(value, int):
            found += varint(number << 3) + varint(value)
            continue
        data = value.encode() if isinstance(value, str) else value
        found += varint(number << 3 | 2) + varint(len(data)) + data
    return found


def varint(value: int) -> bytes:
    low, high = value & 127, value >> 7
    return bytes([low | 128]) + varint(high) if high else bytes([low])


def raw_data(values: bytes) -> bytes:
    return field(9, values)


def dinov2(
    folder: Path,
    *,
    size: int | tuple[int, int],
    others: Mapping[str, np.ndarray] = MappingProxyType({}),
    stored: Callable[[bytes], bytes] = raw_data,
    **resize: str | int | float,
) -> bytes:
    """A folder of transformers as the ONNX file of a model that has more than its backbone.

    Args:
        size: of the images, in pixels; their side or their height and width.
        others: more arrays.
        stored: the fields that hold the values of an array.
        resize: more attributes of the operation that resamples positions.
    """
    arrays = {"head.weight": np.ones((3, 16), np.float32), **others}
    nodes = [node("Conv", "/decoder/Conv", "images", "head.weight")]
    for name, array in load_file(folder / "model.safetensors").items():
        module, own = name.rpartition(".")[0], f"backbone.{name}"
        path = f"/backbone/{module.replace('.', '/').replace('layer/', 'layer.')}"
        if name == "embeddings.position_embeddings":
            arrays |= {"onnx::Concat_7": array[:, :1], "onnx::Reshape_8": array[:, 1:]}
            nodes += [node("Reshape", f"{path}/Reshape_1", "onnx::Reshape_8", "shape")]
            nodes += [node("Concat", f"{path}/Concat_6", "onnx::Concat_7", "patches")]
            cubic = {"mode": "cubic", "coordinate_transformation_mode": "half_pixel"}
            nodes += [node("Resize", f"{path}/Resize", "grid", "", "", "sizes", **cubic | resize)]
        elif array.ndim == 2 and not name.endswith("mask_token"):
            constant = f"onnx::MatMul_{len(arrays)}"
            arrays[constant] = array.T
            nodes += [node("MatMul", f"{path}/MatMul", "tokens", constant)]
        else:
            arrays[own] = array
    return model(arrays, nodes, size, stored)


def model(
    arrays: Mapping[str, np.ndarray],
    nodes: list[bytes],
    size: int | tuple[int, int],
    stored: Callable[[bytes], bytes],
) -> bytes:
    """A file of arrays and operations, of images of some size."""
    sides = (size, size) if isinstance(size, int) else size
    shape = field(1, field(2, "batch"), *(field(1, n) for n in (3, *sides)))
    images = field(1, "images") + field(2, field(1, field(1, 1) + field(2, shape)))
    graph = field(1, *nodes) + field(5, *(tensor(*each, stored) for each in arrays.items()))
    return field(1, 7) + field(7, graph + field(11, images))


def tensor(name: str, array: np.ndarray, stored: Callable[[bytes], bytes]) -> bytes:
    return field(1, *array.shape) + field(2, 1) + field(8, name) + stored(array.tobytes())


def node(kind: str, name: str, *inputs: str, **settings: str | int | float) -> bytes:
    attributes = [field(1, key) + attribute(value) for key, value in settings.items()]
    return field(1, *inputs) + field(3, name) + field(4, kind) + field(5, *attributes)


def attribute(value: str | int | float) -> bytes:
    if isinstance(value, float):
        return varint(2 << 3 | 5) + np.float32(value).tobytes()
    return field(3 if isinstance(value, int) else 4, value)
