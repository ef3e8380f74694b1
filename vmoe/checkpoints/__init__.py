"""Trained models as files: ``read`` chooses the reader of a path, ``write`` a writer by its name.

``_FORMATS`` has an entry per format that can be read.
"""

import sys
from collections.abc import Callable
from pathlib import Path
from typing import Literal, NamedTuple, get_args

from vmoe import models, zoo
from vmoe.checkpoints import export, folder, onnx, released, remote, vit_npz, weights
from vmoe.checkpoints.assemble import assemble
from vmoe.checkpoints.restore import CorruptCheckpoint, find, is_run, restore
from vmoe.checkpoints.stored import Origin, StoredModel
from vmoe.errors import Failure, UsageError, one_line, shortened, unknown
from vmoe.workdir.layout import CHECKPOINTS, read_class_names, read_config

__all__ = ["Origin", "StoredModel", "WriteFormat", "read", "write"]

WriteFormat = Literal["vmoe", "published", "jax", "onnx"]
MAX_MESSAGE = 1_000  # characters
PICKLES = (".pth", ".pt", ".bin", ".ckpt", ".pkl", ".pickle", ".tar")


def read(path: str | Path, *, use_ema: bool = True) -> StoredModel:
    """Reads a trained model.

    Given a run folder, reads the newest intact checkpoint and reports each newer corrupt one on
    stderr.

    Settings that the files do not specify are assumed, and reported on stderr.

    Args:
        path: a run folder, or ``checkpoints/STEP``, ``checkpoints/best`` or ``checkpoints/last``
            in one; a folder with .safetensors files and config.json; a .npz file of a ViT; the
            prefix of a checkpoint of the V-MoE authors; the URL of one of the last three, whose
            files are downloaded once: gs://, https://, hf://OWNER/NAME (``remote``); or a name, see
            ``vmoe.zoo``.
        use_ema: read the moving average of the parameters, if the run has one.

    Raises:
        UsageError: there is no trained model at the path, or one that cannot be represented.
        Failure: the files, or all checkpoints that the path names, are corrupt.
    """
    try:
        local, shown = resolve(path)
        opened = open_weights(local)
        stored = _read_run(local, use_ema) if opened is None else _read_weights(local, opened)
    except (UsageError, Failure) as error:  # it quotes the files, which can hold any text
        raise type(error)(shortened(one_line(str(error)), MAX_MESSAGE)) from None
    if stored.origin.assumed:
        print(f"{shown}: assumed {'; '.join(stored.origin.assumed)}", file=sys.stderr)
    return stored._replace(origin=stored.origin._replace(path=shown))


def resolve(path: str | Path) -> tuple[Path, str | Path]:
    """Resolves a name or a URL to a local path; the files of a URL are downloaded.

    Returns:
        the local path, and the path or URL to show in messages.

    Raises:
        UsageError: the name has no weights, or the URL cannot be read.
        Failure: a downloaded index is corrupt.
    """
    address = zoo.address(str(path))
    if url := remote.url_of(address):
        _refuse_pickle(url)
        return remote.fetch(url), url
    return Path(address), path


def open_weights(path: Path) -> weights.Opened | None:
    """Opens weights without reading their arrays; None if the path is that of a run.

    Raises:
        UsageError: there is no trained model at the path, or one that cannot be represented.
        Failure: the files are corrupt.
    """
    if path.is_dir() and weights.safetensors_file(path) is None:
        for pickle in sorted(path.glob("pytorch_model*.bin")):
            _refuse_pickle(pickle)
    for supported in _FORMATS:
        if supported.matches(path):
            return None if supported.open is None else supported.open(path)
    _refuse_pickle(path)
    reason = "no checkpoint of a known format" if path.exists() else "no such file or folder"
    formats = "; or ".join(supported.description for supported in _FORMATS)
    raise UsageError(f"{path}: {reason}; give {formats}")


def _refuse_pickle(path: str | Path) -> None:
    if str(path).endswith(PICKLES):
        raise UsageError(
            f"{path}: pickle files are not read, because reading one can run code; convert it: "
            "torch.load(FILE, weights_only=True), then safetensors.torch.save_file"
        )


def _read_run(path: Path, use_ema: bool) -> StoredModel:
    workdir, steps = find(path)
    config = read_config(workdir)
    class_names = tuple(read_class_names(workdir))
    target = models.params_of(models.build_abstract(config.model))
    item, weights = ("ema", "ema") if use_ema and config.ema_decay else ("params", "raw")
    for step in reversed(steps):
        folder = workdir / CHECKPOINTS / str(step)
        try:
            params = restore(folder, **{item: target})[item]
        except CorruptCheckpoint as error:
            # A run that is being trained deletes old checkpoints.
            reason = f"is corrupt ({error})" if folder.exists() else "was deleted meanwhile"
            print(f"{workdir}: checkpoint {step} {reason}", file=sys.stderr)
            continue
        return StoredModel(
            config=config.model,
            params=params,
            class_names=class_names,
            preprocessing=config.preprocessing,
            step=step,
            origin=Origin("run", path, weights),
            train_config=config,
            loss=config.loss,
        )
    raise Failure(f"{path}: no intact checkpoint; the lines above say why")


def _read_weights(path: Path, opened: weights.Opened) -> StoredModel:
    assembled = assemble(opened.conversion)
    details = opened.details(assembled.config)
    origin = Origin(
        opened.format,
        path,
        assumed=details.assumed,
        unused=assembled.unused,
        copied_from=details.copied_from,
    )
    return StoredModel(
        config=assembled.config,
        params=assembled.params,
        class_names=details.class_names,
        preprocessing=details.preprocessing,
        step=details.step,
        origin=origin,
        loss=details.loss,
    )


def write(
    stored: StoredModel, path: str | Path, *, format: WriteFormat, shards: int = 1
) -> str | Path:
    """Writes a trained model.

    Args:
        path: a new folder; for "published", the prefix of the files; for "onnx", a file; for
            "vmoe" also hf://OWNER/NAME, to which the folder is pushed.
        format: "vmoe", a folder with safetensors, config.json and a model card; "published", which
            the V-MoE authors' code reads, and which holds the parameters only; "jax" or "onnx", a
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
            folder.write(path, stored)
        case "published":
            released.write(path, stored.config, stored.params, shards=shards)
        case "jax":
            export.write(path, stored)
        case "onnx":
            onnx.write(path, stored)
    return path


class _Format(NamedTuple):
    """A format that ``read`` supports.

    Attributes:
        description: of its paths.
        matches: whether a path is one of them.
        open: opens weights; None for a run, whose arrays Orbax reads.
    """

    description: str
    matches: Callable[[Path], bool]
    open: Callable[[Path], weights.Opened] | None = None


_FORMATS = (
    _Format(
        "a run folder (it has config.json), or its checkpoints/STEP, checkpoints/best or "
        "checkpoints/last",
        lambda path: is_run(path) and weights.safetensors_file(path) is None,
    ),
    _Format(
        "a folder with model.safetensors and config.json (of vmoe, timm or Hugging Face)",
        lambda path: weights.safetensors_file(path) is not None,
        weights.open_safetensors,
    ),
    _Format("a .npz file of a ViT", vit_npz.matches, weights.open_npz),
    _Format(
        "the PREFIX of a published checkpoint, PREFIX.index",
        weights.is_published,
        weights.open_published,
    ),
)
