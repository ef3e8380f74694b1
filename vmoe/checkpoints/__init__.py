"""Trained models as files: ``read`` reads them in any format, ``write`` writes one by its name."""

import sys
from pathlib import Path
from typing import Literal, get_args

from vmoe.checkpoints import remote, vmoe_format
from vmoe.checkpoints.assemble import assemble
from vmoe.checkpoints.export import jax_program, onnx_file, published
from vmoe.checkpoints.opening import Run, open_weights, resolve
from vmoe.checkpoints.restore import CorruptCheckpoint, find, restore, split_path
from vmoe.checkpoints.stored import Origin, StoredModel
from vmoe.errors import Failure, UsageError, one_line, shortened, unknown
from vmoe.workdir.layout import CHECKPOINTS

__all__ = ["Origin", "StoredModel", "WriteFormat", "read", "write"]

WriteFormat = Literal["vmoe", "published", "jax", "onnx"]
MAX_MESSAGE = 1_000  # characters


def read(path: str | Path, *, use_ema: bool = True) -> StoredModel:
    """Reads a trained model.

    Given a run folder, reads the newest intact checkpoint and reports each newer corrupt one on
    stderr.

    Settings that the files do not specify are assumed, and reported on stderr.

    Args:
        path: a run folder, or ``checkpoints/STEP``, ``checkpoints/best`` or ``checkpoints/last``
            in one; a folder with .safetensors files and config.json; a .npz file of a ViT; the
            prefix of a published V-MoE checkpoint; the URL of one of the last three, whose files
            are downloaded once: gs://, https://, hf://OWNER/NAME (``remote``); or a name, see
            ``vmoe.zoo``.
        use_ema: read the moving average of the parameters, if the run has one.

    Raises:
        UsageError: there is no trained model at the path, or one that cannot be represented.
        Failure: the files, or all checkpoints that the path names, are corrupt.
    """
    try:
        local, shown = resolve(path)
        opened = open_weights(local, use_ema=use_ema)
        stored = _read_run(opened) if isinstance(opened, Run) else assemble(opened)
    except (UsageError, Failure) as error:  # it quotes the files, which can hold any text
        raise type(error)(shortened(one_line(str(error)), MAX_MESSAGE)) from None
    if stored.origin.assumed:
        print(f"{shown}: assumed {'; '.join(stored.origin.assumed)}", file=sys.stderr)
    return stored._replace(origin=stored.origin._replace(path=shown))


def _read_run(run: Run) -> StoredModel:
    path, model, steps = run
    workdir, _ = split_path(path)
    item = "ema" if model.origin.weights == "ema" else "params"
    tried: set[int] = set()
    while left := [step for step in steps if step not in tried]:
        step = left[-1]
        tried.add(step)
        folder = workdir / CHECKPOINTS / str(step)
        try:
            return model._replace(params=restore(folder, **{item: model.params})[item], step=step)
        except CorruptCheckpoint as error:
            if folder.exists():
                print(f"{workdir}: checkpoint {step} is corrupt ({error})", file=sys.stderr)
            else:  # a run that is being trained deletes old checkpoints, and has newer ones
                print(f"{workdir}: checkpoint {step} was deleted meanwhile", file=sys.stderr)
                _, steps = find(path)
    raise Failure(f"{path}: no intact checkpoint; the reasons are above")


def write(
    stored: StoredModel, path: str | Path, *, format: WriteFormat, shards: int = 1
) -> str | Path:
    """Writes a trained model.

    Args:
        path: a new folder; for "published", the prefix of the files; for "onnx", a file; for
            "vmoe" also hf://OWNER/NAME, to which the folder is pushed.
        format: "vmoe", a folder with safetensors, config.json and a model card; "published", the
            parameters alone, in files that the V-MoE authors' code reads; "jax" or "onnx", a
            program that runs without this package, with one image per group.
        shards: number of data files of a published checkpoint.

    Returns:
        the path, or the URL in its usual spelling.

    Raises:
        UsageError: the format cannot hold this model, or the files exist.
        Failure: the files cannot be written.
    """
    if format not in get_args(WriteFormat):
        raise UsageError(unknown("no format", format, list(get_args(WriteFormat))))
    if url := remote.url_of(path):
        if format != "vmoe":
            raise UsageError(f"{url}: only the format vmoe can be written to a URL")
        remote.push(stored, url)
        return url
    path = Path(path)
    match format:
        case "vmoe":
            vmoe_format.write(path, stored)
        case "published":
            published.write(path, stored.config, stored.params, shards=shards)
        case "jax":
            jax_program.write(path, stored)
        case "onnx":
            onnx_file.write(path, stored)
    return path
