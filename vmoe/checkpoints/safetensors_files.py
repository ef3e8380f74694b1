"""Arrays in .safetensors files, one or several with a common index."""

import re
from collections.abc import Collection, Iterator
from pathlib import Path
from typing import Any

import numpy as np
from safetensors import SafetensorError, safe_open

from vmoe.checkpoints.arrays import ArrayFile, ArrayInfo, array_info, corrupt
from vmoe.errors import Failure, parse_json
from vmoe.host.retry import open_retried, retried

INDEX = ".index.json"
DTYPES = {  # in a file -> NumPy's name
    **{"BOOL": "bool", "BF16": "bfloat16", "F16": "float16", "F32": "float32", "F64": "float64"},
    **{
        f"{c}{bits}": f"{n}{bits}"
        for c, n in (("I", "int"), ("U", "uint"))
        for bits in (16, 32, 64)
    },
    **{"I8": "int8", "U8": "uint8"},
}


def read(path: str | Path) -> ArrayFile:
    """The arrays of a .safetensors file, or of all files in an index (.safetensors.index.json)."""
    path = Path(path)
    indexed = _indexed(path) if path.name.endswith(INDEX) else {None: path}
    infos: dict[str, ArrayInfo] = {}
    places: dict[str, Path] = {}
    for file in dict.fromkeys(indexed.values()):
        found = _infos(file)
        if twice := sorted(found.keys() & infos.keys()):
            raise corrupt(file, f"{twice[0]} is in another file, too")
        infos |= found
        places |= dict.fromkeys(found, file)
    for name, file in indexed.items():
        if name is not None and places.get(name) != file:
            raise corrupt(file, f"{name} is missing, which {path.name} expects here")

    def arrays(names: Collection[str]) -> Iterator[tuple[str, np.ndarray]]:
        for file in dict.fromkeys(places.values()):
            with _open(file) as opened:
                for name, place in places.items():
                    if name in names and place == file:
                        yield name, opened.get_tensor(name)

    return ArrayFile(path, infos, arrays)


def files(path: Path) -> list[Path]:
    """All files that ``read`` reads: the file, or an index and the files that it lists."""
    return [path, *dict.fromkeys(_indexed(path).values())] if path.name.endswith(INDEX) else [path]


def _indexed(path: Path) -> dict[str | None, Path]:
    """The file of each array."""
    try:
        names: Any = parse_json(retried(path, path.read_bytes))["weight_map"]
        if wrong := [
            file for file in names.values() if not re.fullmatch(r"[\w.-]+\.safetensors", file)
        ]:
            raise ValueError(f"it names {wrong[0]!r:.80}, which is no file in its folder")
        return {name: path.with_name(file) for name, file in names.items()}
    except OSError as error:
        raise Failure(f"{path}: {error.strerror}") from None
    except (ValueError, TypeError, KeyError, AttributeError) as error:
        raise corrupt(path, error) from None


def _infos(path: Path) -> dict[str, ArrayInfo]:
    infos = {}
    try:
        with _open(path) as file:
            for name in file.keys():
                array = file.get_slice(name)
                if (dtype := array.get_dtype()) not in DTYPES:
                    raise ValueError(f"{name} has dtype {dtype}, which is not supported")
                infos[name] = array_info(array.get_shape(), DTYPES[dtype])
    except OSError as error:
        raise Failure(f"{path}: {error.strerror or error}") from None
    except (SafetensorError, ValueError, KeyError) as error:
        raise corrupt(path, error) from None
    return infos


def _open(path: Path) -> Any:
    """Opens a file; safetensors reports each file that it cannot open as missing."""
    open_retried(path).close()
    return safe_open(path, framework="numpy")
