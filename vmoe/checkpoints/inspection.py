"""The arrays in files of weights, and the parameters that this package would read from them."""

from pathlib import Path
from typing import NamedTuple

from vmoe.checkpoints.assemble import outline, shapes_in, whole_path
from vmoe.checkpoints.opening import Run, open_weights, resolve
from vmoe.checkpoints.stored import Format, StoredModel
from vmoe.errors import UsageError
from vmoe.trees import by_name


class StoredArray(NamedTuple):
    """An array in a file.

    Attributes:
        nbytes: number of bytes, uncompressed.
        paths: the parameters that it holds; empty if it is not used; None if its name is unknown
            or its shape does not fit the name.
    """

    name: str
    shape: tuple[int, ...]
    dtype: str
    nbytes: int
    paths: tuple[str, ...] | None


class Inspection(NamedTuple):
    """The arrays in files, and their model.

    Attributes:
        model: the model, with shapes instead of arrays; None if it cannot be represented.
        reason: why it cannot be represented; else empty.
    """

    format: Format
    arrays: list[StoredArray]
    model: StoredModel | None
    reason: str = ""


def inspect(path: str | Path) -> Inspection:
    """Lists the arrays in files of weights, without reading them.

    Args:
        path: as for ``read``.
    """
    local, _ = resolve(path)
    opened = open_weights(local)
    if isinstance(opened, Run):
        params = by_name(opened.model.params)
        arrays = [
            StoredArray(name, leaf.shape, leaf.dtype.name, leaf.size * leaf.dtype.itemsize, (name,))
            for name, leaf in params.items()
        ]
        return Inspection("run", arrays, opened.model)
    arrays = []
    for name, info in opened.arrays.infos.items():
        try:
            paths = shapes_in(opened, name)
        except UsageError:
            paths = None
        known = None if paths is None else tuple(map(whole_path, paths))
        arrays.append(StoredArray(name, info.shape, info.dtype.name, info.nbytes, known))
    try:
        return Inspection(opened.origin.format, arrays, outline(opened))
    except UsageError as error:
        return Inspection(opened.origin.format, arrays, None, str(error))
