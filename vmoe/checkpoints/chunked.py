"""The container of the published checkpoints: PREFIX.index and PREFIX.data-nnnnn-of-NNNNN.

Each file is one msgpack object. The index maps a name to the shape and dtype of its array, and to
the data file of each of its slices. A data file maps the number of an array, counted over the
sorted names, to slices, whose elements lie flat in pieces of at most 2^30 bytes.
"""

import itertools
import math
from collections.abc import Collection, Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import msgpack
import numpy as np

from vmoe.checkpoints.arrays import ArrayFile, ArrayInfo, array_info, corrupt
from vmoe.errors import Failure
from vmoe.host.retry import open_retried, retried

VERSION = "20220622"
MARK = "__msgpack_array_chunk_a87ca2__"  # a key of every data file
PIECE = 1 << 30  # bytes
ARRAY, SCALAR, SLICE_ND, INDEX = 1, 3, 6, 8  # codes of msgpack's extension types
BYTES_HEADER = {0xC4: 1, 0xC5: 2, 0xC6: 4, 0xD9: 1, 0xDA: 2, 0xDB: 4}  # type -> bytes of the length
WRONG = (  # errors that invalid content raises
    *(ValueError, TypeError, KeyError, IndexError, AttributeError, OverflowError, RecursionError),
    *(msgpack.exceptions.UnpackException, msgpack.exceptions.BufferFull),
)

Box = tuple[tuple[int, int], ...]  # start and stop along each axis


class _Entry(NamedTuple):
    """An array in the index.

    Attributes:
        number: the key in data files.
        files: the number of the data file of each slice.
    """

    number: int
    info: ArrayInfo
    files: dict[Box, int]


def exists(prefix: str | Path) -> bool:
    """Whether there is a checkpoint at a prefix."""
    return index_path(prefix).is_file()


def index_path(prefix: str | Path) -> Path:
    """The index of the checkpoint at a prefix."""
    return Path(f"{prefix}.index")


def data_paths(prefix: str | Path, count: int) -> list[Path]:
    """The data files of the checkpoint at a prefix."""
    return [Path(f"{prefix}.data-{i:05d}-of-{count:05d}") for i in range(count)]


def read(prefix: str | Path) -> ArrayFile:
    """The arrays of a checkpoint, after checking that the slices cover each of them once."""
    path = index_path(prefix)
    count, entries = _read_index(path)
    files = data_paths(prefix, count)
    if missing := [file for file in files if not file.is_file()]:
        raise Failure(f"{missing[0]}: missing; {path.name} names {count} data files")
    declared = sum(entry.info.nbytes for entry in entries.values())
    if declared > (present := sum(file.stat().st_size for file in files)):
        raise corrupt(path, f"its arrays have {declared:,} bytes, its data files {present:,}")

    def arrays(names: Collection[str]) -> Iterator[tuple[str, np.ndarray]]:
        return _read_data(files, {name: entries[name] for name in names})

    return ArrayFile(path, {name: entry.info for name, entry in entries.items()}, arrays)


def data_files(prefix: str | Path) -> list[Path]:
    """The data files that the index of a checkpoint lists; they may still be missing."""
    return data_paths(prefix, _read_index(index_path(prefix))[0])


def _read_index(path: Path) -> tuple[int, dict[str, _Entry]]:
    """The number of data files, and the arrays by name."""
    try:
        content = msgpack.unpackb(
            retried(path, path.read_bytes), strict_map_key=False, max_array_len=0
        )
        return _parse_index(content)
    except OSError as error:
        raise Failure(f"{path}: {error.strerror}") from None
    except WRONG as error:
        raise corrupt(path, _reason(error)) from None


def _parse_index(content: Any) -> tuple[int, dict[str, _Entry]]:
    if "version" not in content:
        raise ValueError("it has no version, so an older program wrote it, in another layout")
    if content["version"] != VERSION:
        raise ValueError(f"version {content['version']!r:.40}, not {VERSION}")
    count = content["shard_count"]
    if type(count) is not int or not 1 <= count <= 99_999:
        raise ValueError(f"shard_count {count!r:.40}")
    entries = {}
    for number, (name, leaf) in enumerate(leaves(content["index"])):
        try:
            info, files = _parse_entry(leaf, count)
        except WRONG as error:
            raise ValueError(f"{name}: {_reason(error)}") from None
        entries[name] = _Entry(number, info, files)
    return count, entries


def leaves(tree: Any, prefix: str = "") -> Iterator[tuple[str, Any]]:
    """The leaves of nested maps with their names, in the order of the sorted keys."""
    for key in sorted(tree):
        if not isinstance(key, str) or not key or "/" in key:
            raise ValueError(f"name {key!r:.80}")
        if isinstance(tree[key], dict):
            yield from leaves(tree[key], f"{prefix}{key}/")
        else:
            yield prefix + key, tree[key]


def _parse_entry(leaf: Any, count: int) -> tuple[ArrayInfo, dict[Box, int]]:
    """An array's shape and dtype, and the data file of each slice."""
    if leaf.code != INDEX:
        raise ValueError(f"extension type {leaf.code}, not {INDEX}")
    unpacker = _unpacker(leaf.data)
    if unpacker.read_array_header() != 3:
        raise ValueError("an entry is not (shape and dtype, slices, data files)")
    shaped, slices, files = _unpacker(unpacker.unpack()), _list(unpacker), _list(unpacker)
    shaped.read_array_header()
    info = array_info(_list(shaped), shaped.unpack())
    boxes = [_parse_box(each, info) for each in slices]
    if len(files) != len(boxes) or not all(type(i) is int and 0 <= i < count for i in files):
        raise ValueError(f"data files {files!r:.80} of {len(boxes)} slices")
    _check_cover(boxes, info)
    return info, dict(zip(boxes, files, strict=True))


def _unpacker(data: bytes) -> msgpack.Unpacker:
    """Unpacks the values of msgpack data one by one.

    An array or a map among them is an error: msgpack would allocate the length that it declares.
    """
    unpacker = msgpack.Unpacker(max_array_len=0, max_map_len=0, max_buffer_size=max(len(data), 1))
    unpacker.feed(data)
    return unpacker


def _list(unpacker: msgpack.Unpacker) -> list[Any]:
    """The elements of the array that comes next."""
    return [unpacker.unpack() for _ in range(unpacker.read_array_header())]


def _parse_box(data: bytes, info: ArrayInfo) -> Box:
    box = []
    for part in _list(_unpacker(data)):
        start, stop, step = _list(_unpacker(part))
        if type(start) is not int or type(stop) is not int or step not in (None, 1):
            raise ValueError(f"slice {start!r:.20}:{stop!r:.20}:{step!r:.20}")
        box.append((start, stop))
    inside = len(box) == len(info.shape) and all(
        0 <= start < stop <= n for (start, stop), n in zip(box, info.shape, strict=True)
    )
    if not inside:
        raise ValueError(f"slice {box!r:.80} of shape {info.shape}")
    return tuple(box)


def _check_cover(boxes: list[Box], info: ArrayInfo) -> None:
    """Checks that slices cover an array exactly once.

    The corners that occur an odd number of times determine which elements an odd number of slices
    cover: if they are the array's own corners, every element is covered. If the slices have as many
    elements as the array, each is covered once.
    """
    corners: set[tuple[int, ...]] = set()
    for box in boxes:
        corners ^= set(itertools.product(*box))
    expected = set(itertools.product(*((0, n) for n in info.shape))) if info.size else set()
    if sum(map(volume, boxes)) != info.size or corners != expected:
        raise ValueError("its slices leave elements out, or overlap")


def volume(box: Box) -> int:
    return math.prod(stop - start for start, stop in box)


def _read_data(files: list[Path], entries: dict[str, _Entry]) -> Iterator[tuple[str, np.ndarray]]:
    """The arrays of some entries, one data file after the other."""
    numbers = {str(entry.number): name for name, entry in entries.items()}
    arrays: dict[str, np.ndarray] = {}
    missing = {name: dict(entry.files) for name, entry in entries.items()}
    for i, file in enumerate(files):
        for name, slices in _slices_of(file, numbers):
            array = arrays.setdefault(name, np.empty(*entries[name].info))
            try:
                for pieces, box in slices:
                    if missing[name].get(box) != i:
                        raise ValueError(f"slice {box}, which the index does not expect here")
                    _fill(array, box, pieces)
                    del missing[name][box]
            except WRONG as error:
                raise corrupt(file, f"{name}: {_reason(error)}") from None
            if not missing[name]:
                yield name, arrays.pop(name)
    for name, entry in entries.items():
        if missing[name]:
            file = files[next(iter(missing[name].values()))]
            raise corrupt(file, f"{name}: a slice is missing")
        if not entry.files:  # an array without elements
            yield name, np.empty(*entry.info)


def _slices_of(file: Path, numbers: Mapping[str, str]) -> Iterator[tuple[str, list[Any]]]:
    """The slices (pieces, box) of some arrays in a data file, with the name of each array."""
    size = file.stat().st_size
    with open_retried(file) as opened:
        unpacker = msgpack.Unpacker(
            opened,
            read_size=min(1 << 20, max(size, 1)),
            max_buffer_size=max(size, 1),
            max_array_len=0,
            max_map_len=0,
            ext_hook=_parse_extension,
            strict_map_key=False,
        )
        try:
            for _ in range(unpacker.read_map_header()):
                key = str(unpacker.unpack())
                if key in numbers:
                    yield (
                        numbers[key],
                        [_slice(unpacker) for _ in range(unpacker.read_array_header())],
                    )
                else:
                    unpacker.skip()
            if unpacker.tell() != size:
                raise ValueError(f"{size - unpacker.tell():,} bytes follow its end")
        except WRONG as error:
            raise corrupt(file, _reason(error)) from None


def _slice(unpacker: msgpack.Unpacker) -> tuple[list[Any], Any]:
    """A slice: its elements in pieces, and its box."""
    if unpacker.read_array_header() != 2:
        raise ValueError("a slice is not (pieces, box)")
    return _list(unpacker), unpacker.unpack()


def _parse_extension(code: int, data: bytes) -> Any:
    if code in (ARRAY, SCALAR):
        return _parse_array(data)
    if code == SLICE_ND:
        return tuple(tuple(_list(_unpacker(part))[:2]) for part in _list(_unpacker(data)))
    raise ValueError(f"extension type {code}")


def _parse_array(data: bytes) -> np.ndarray:
    """The array (shape, dtype, bytes) that msgpack data holds, without copying its elements."""
    unpacker = _unpacker(data[:256])
    if unpacker.read_array_header() != 3:
        raise ValueError("an array is not (shape, dtype, bytes)")
    info = array_info(_list(unpacker), unpacker.unpack())
    start = unpacker.tell()
    width = BYTES_HEADER[data[start]]
    length = int.from_bytes(data[start + 1 : start + 1 + width], "big")
    if length != info.nbytes or len(data) != start + 1 + width + length:
        raise ValueError(f"an array of shape {info.shape} has {length:,} bytes")
    flat = np.frombuffer(data, info.dtype, info.size, start + 1 + width)
    return flat.reshape(info.shape)


def _fill(array: np.ndarray, box: Box, pieces: list[np.ndarray]) -> None:
    for piece in pieces:
        if piece.dtype != array.dtype:
            raise ValueError(f"dtype {piece.dtype}, in the index {array.dtype}")
    elements = sum(piece.size for piece in pieces)
    if elements != volume(box):
        raise ValueError(f"slice {box} has {elements:,} elements")
    flat = pieces[0] if len(pieces) == 1 else np.concatenate([each.reshape(-1) for each in pieces])
    array[tuple(slice(*each) for each in box)] = flat.reshape([b - a for a, b in box])


def _reason(error: Exception) -> str:
    if isinstance(error, msgpack.exceptions.OutOfData):
        return "truncated"
    return str(error) if type(error) is ValueError and str(error) else "not valid in this format"
