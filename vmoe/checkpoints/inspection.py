"""What files of weights hold, array by array, and what this package would make of it."""

from pathlib import Path
from typing import NamedTuple

import jax

from vmoe import models
from vmoe.checkpoints import open_weights, resolve
from vmoe.checkpoints.assemble import infer, paths_of
from vmoe.checkpoints.checksums import by_name
from vmoe.checkpoints.restore import find
from vmoe.checkpoints.stored import Details, Format
from vmoe.config import ViTConfig
from vmoe.errors import UsageError
from vmoe.workdir.layout import read_class_names, read_config


class StoredArray(NamedTuple):
    """An array in a file.

    Attributes:
        nbytes: number of bytes, uncompressed.
        paths: the parameters that it holds; empty if it is of no use; None if its name is unknown
            or its shape does not fit the name.
    """

    name: str
    shape: tuple[int, ...]
    dtype: str
    nbytes: int
    paths: tuple[str, ...] | None


class Inspection(NamedTuple):
    """What files hold.

    Attributes:
        config: of the model; None if it cannot be represented.
        details: what belongs to the model; None likewise.
        reason: why it cannot be represented; else empty.
    """

    format: Format
    arrays: list[StoredArray]
    config: ViTConfig | None
    details: Details | None
    reason: str


def inspect(path: str | Path) -> Inspection:
    """Lists what files of weights hold, without reading their arrays.

    Args:
        path: as for ``read``.

    Raises:
        UsageError: there is no trained model at the path, or the files do not say which it is.
        Failure: the files are corrupt.
    """
    path, _ = resolve(path)
    opened = open_weights(path)
    if opened is None:
        return _inspect_run(path)
    conversion, arrays, reason = opened.conversion, [], ""
    for name, info in conversion.file.infos.items():
        try:
            paths = paths_of(conversion, name)
        except UsageError:
            paths = None
        known = None if paths is None else tuple(paths)
        arrays.append(StoredArray(name, info.shape, info.dtype.name, info.nbytes, known))
    try:
        config, _ = infer(conversion)
        return Inspection(opened.format, arrays, config, opened.details(config), "")
    except UsageError as error:
        reason = str(error)
    return Inspection(opened.format, arrays, None, None, reason)


def _inspect_run(path: Path) -> Inspection:
    workdir, steps = find(path)
    run = read_config(workdir)
    params = by_name(models.params_of(models.build_abstract(run.model)))
    return Inspection(
        "run",
        [_array(name, leaf) for name, leaf in params.items()],
        run.model,
        Details(tuple(read_class_names(workdir)), run.preprocessing, step=steps[-1]),
        "",
    )


def _array(name: str, leaf: jax.ShapeDtypeStruct) -> StoredArray:
    nbytes = leaf.size * leaf.dtype.itemsize
    return StoredArray(name, leaf.shape, leaf.dtype.name, nbytes, (name,))
