"""The arrays and the operations in an ONNX file, as data: nothing is executed.

Such a file is a message of Protocol Buffers. A message is a sequence of fields, each a number,
whose meaning onnx.proto has, and an integer or some bytes, which may be a message again.
"""

from collections import defaultdict
from pathlib import Path
from typing import NamedTuple

import numpy as np

from vmoe.checkpoints.arrays import array_info, corrupt
from vmoe.errors import Failure, UsageError
from vmoe.retry import read_regular, retried

DTYPES = {1: "float32", 10: "float16", 11: "float64", 16: "bfloat16"}  # those of parameters
RAW_DATA = 9  # the field of the bytes of an array
PACKED = {"float32": 4, "float64": 10}  # fields with the same bytes
VARINT, BYTES = 0, 2  # kinds of a field
FIXED = {1: 8, 5: 4}  # the bytes of other kinds
MOST_FIELDS = 1 << 20  # of a message; each takes some 200 bytes here


class Node(NamedTuple):
    """An operation, such as the Add whose name is ``/encoder/layer.0/norm1/Add``.

    Attributes:
        settings: its attributes that are a text or a number; of others, the text is empty.
    """

    kind: str
    name: str
    inputs: list[str]
    settings: dict[str, str | float]


class Graph(NamedTuple):
    """The content of an ONNX file.

    Attributes:
        arrays: the arrays of floats by name, in the order of the file.
        input_shape: the axes of the first input, None where the number is free.
    """

    arrays: dict[str, np.ndarray]
    nodes: list[Node]
    input_shape: list[int | None]


def read(path: Path) -> Graph:
    """Reads a file into memory.

    Raises:
        UsageError: the values of an array are not in the file, or not as bytes.
        Failure: the file cannot be read or is corrupt.
    """
    try:
        return _graph(_Message(memoryview(retried(path, lambda: read_regular(path)))))
    except OSError as error:
        raise Failure(f"{path}: {error.strerror}") from None
    except UsageError as error:
        raise UsageError(f"{path}: {error}") from None
    except ValueError as error:
        raise corrupt(path, error) from None


class _Message:
    """The fields of a message."""

    def __init__(self, data: memoryview) -> None:
        self.fields: dict[int, list[int | memoryview]] = defaultdict(list)
        at = count = 0
        while at < len(data):
            if (count := count + 1) > MOST_FIELDS:
                raise ValueError(f"a message has more than {MOST_FIELDS:,} fields")
            tag, at = _varint(data, at)
            kind = tag & 7
            if kind == VARINT:
                value, at = _varint(data, at)
            else:
                size, at = _varint(data, at) if kind == BYTES else (FIXED.get(kind, 0), at)
                value, at = data[at : at + size], at + size
                if at > len(data) or kind not in (BYTES, *FIXED):
                    raise ValueError(f"field {tag >> 3} of kind {kind} ends at byte {at:,}")
            self.fields[tag >> 3].append(value)

    def parts(self, number: int) -> list[memoryview]:
        """The bytes of all fields of a number."""
        parts = []
        for value in self.fields[number]:
            if isinstance(value, int):
                raise ValueError(f"field {number} is {value}")
            parts.append(value)
        return parts

    def messages(self, number: int) -> list["_Message"]:
        return [_Message(part) for part in self.parts(number)]

    def text(self, number: int) -> str:
        """The last text of a number; empty if there is none."""
        return str(b"".join(self.parts(number)[-1:]), "utf-8")

    def integers(self, number: int) -> list[int]:
        """The integers of a number, each in a field of its own or several in one."""
        found = []
        for value in self.fields[number]:
            if isinstance(value, int):
                found.append(value)
                continue
            at = 0
            while at < len(value):
                integer, at = _varint(value, at)
                found.append(integer)
        return found


def _varint(data: memoryview, at: int) -> tuple[int, int]:
    """An integer in groups of seven bits, and the place after it."""
    value = 0
    for i, byte in enumerate(data[at : at + 10]):
        value |= (byte & 0x7F) << 7 * i
        if byte < 0x80:
            return value, at + i + 1
    raise ValueError(f"no integer ends after byte {at:,}")


def _graph(model: _Message) -> Graph:
    graphs = model.messages(7)
    if len(graphs) != 1:
        raise ValueError(f"it has {len(graphs)} graphs")
    arrays = [found for each in graphs[0].messages(5) if (found := _array(each))]
    if len(dict(arrays)) < len(arrays):
        raise ValueError("two arrays have one name")
    nodes = [_node(each) for each in graphs[0].messages(1)]
    return Graph(dict(arrays), nodes, _shape(graphs[0].messages(11)))


def _array(tensor: _Message) -> tuple[str, np.ndarray] | None:
    """An array with its name; None if it is not of floats."""
    name, kind = tensor.text(8), tensor.integers(2)[-1:]
    if not kind or kind[0] not in DTYPES:
        return None
    dtype = DTYPES[kind[0]]
    if any(tensor.integers(14)):
        raise UsageError(
            f"the values of {name!r:.80} lie in another file (external data): put them into this "
            "one, onnx.save(onnx.load(FILE), NEW)"
        )
    if tensor.fields[5]:
        raise UsageError(
            f"the values of {name!r:.80} are in int32_data: store those of each array as bytes, "
            "array.CopyFrom(onnx.numpy_helper.from_array(onnx.numpy_helper.to_array(array), "
            "array.name))"
        )
    info = array_info(tensor.integers(1), dtype)
    parts = tensor.parts(RAW_DATA) or tensor.parts(PACKED.get(dtype, RAW_DATA))
    values = parts[0] if len(parts) == 1 else b"".join(parts)
    if len(values) != info.nbytes:
        raise ValueError(f"{name!r:.80} has shape {info.shape} and {len(values):,} bytes")
    return name, np.frombuffer(values, info.dtype).reshape(info.shape)


def _node(node: _Message) -> Node:
    inputs = [str(part, "utf-8") for part in node.parts(1)]
    settings = {each.text(1): _setting(each) for each in node.messages(5)}
    return Node(node.text(4), node.text(3), inputs, settings)


def _setting(attribute: _Message) -> str | float:
    if numbers := [*np.frombuffer(b"".join(attribute.parts(2)), "<f4"), *attribute.integers(3)]:
        return float(numbers[-1])
    return attribute.text(4)


def _shape(inputs: list[_Message]) -> list[int | None]:
    """The axes of the first input."""
    types = [kind for each in inputs[:1] for kind in each.messages(2)]
    shapes = [
        shape for kind in types for tensor in kind.messages(1) for shape in tensor.messages(2)
    ]
    return [sum(axis.integers(1)) or None for shape in shapes for axis in shape.messages(1)]
