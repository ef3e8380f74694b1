"""Trained models as files. Only ``read`` chooses the reader of a path.

A reader is a function from a path to a ``StoredModel``; ``_FORMATS`` has an entry per format.
"""

import sys
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

from flax import nnx

from vmoe import models
from vmoe.checkpoints import vit_npz, weights
from vmoe.checkpoints.restore import CorruptCheckpoint, find, is_run, restore
from vmoe.checkpoints.stored import Origin, StoredModel
from vmoe.config.preprocessing import Preprocessing
from vmoe.errors import Failure, UsageError
from vmoe.workdir.layout import CHECKPOINTS, read_class_names, read_config

__all__ = ["Origin", "StoredModel", "read"]

PICKLES = (".pth", ".pt", ".bin", ".ckpt", ".pkl", ".pickle", ".tar")


def read(path: str | Path, *, use_ema: bool = True) -> StoredModel:
    """Reads a trained model.

    Given a run folder, reads the newest intact checkpoint and reports each newer corrupt one on
    stderr.

    What the files do not tell is assumed, and reported on stderr.

    Args:
        path: a run folder, or ``checkpoints/STEP``, ``checkpoints/best`` or ``checkpoints/last``
            in one; a folder with .safetensors files and config.json; a .npz file of a ViT; or the
            prefix of a checkpoint of the V-MoE authors.
        use_ema: read the moving average of the parameters, if the run has one.

    Raises:
        UsageError: there is no trained model at the path, or one that cannot be represented.
        Failure: the files, or all checkpoints that the path names, are corrupt.
    """
    path = Path(path)
    for supported in _FORMATS:
        if supported.matches(path):
            stored = supported.read(path, use_ema)
            if stored.origin.assumed:
                print(f"{path}: assumed {'; '.join(stored.origin.assumed)}", file=sys.stderr)
            return stored
    if path.suffix in PICKLES:
        raise UsageError(
            f"{path}: a pickle, which can run code when it is read, so it is not; convert it: "
            "torch.load(FILE, weights_only=True), then safetensors.torch.save_file"
        )
    reason = "no checkpoint of a known format" if path.exists() else "no such file or folder"
    formats = "; or ".join(supported.description for supported in _FORMATS)
    raise UsageError(f"{path}: {reason}; give {formats}")


def _read_run(path: Path, use_ema: bool) -> StoredModel:
    workdir, steps = find(path)
    config = read_config(workdir)
    class_names = tuple(read_class_names(workdir))
    target = nnx.to_pure_dict(nnx.state(models.build_abstract(config.model), nnx.Param))
    item, weights = ("ema", "ema") if use_ema and config.ema_decay else ("params", "raw")
    for step in reversed(steps):
        try:
            params = restore(workdir / CHECKPOINTS / str(step), **{item: target})[item]
        except CorruptCheckpoint as error:
            print(f"{workdir}: checkpoint {step} is corrupt ({error})", file=sys.stderr)
            continue
        return StoredModel(
            config=config.model,
            params=params,
            class_names=class_names,
            preprocessing=Preprocessing(config.model.image_size),
            step=step,
            origin=Origin("run", path, weights),
            train_config=config,
        )
    raise Failure(f"{path}: no intact checkpoint; the lines above name the corrupt ones")


class _Format(NamedTuple):
    """A format that ``read`` supports: a description of its paths, a test for them, a reader."""

    description: str
    matches: Callable[[Path], bool]
    read: Callable[[Path, bool], StoredModel]


_FORMATS = (  # a run folder is told by config.json, which folders of weights have, too
    _Format(
        "a folder with model.safetensors and config.json (of vmoe, timm or Hugging Face)",
        lambda path: weights.safetensors_file(path) is not None,
        lambda path, _: weights.read_safetensors(path),
    ),
    _Format(
        "a run folder (it has config.json), or its checkpoints/STEP, checkpoints/best or "
        "checkpoints/last",
        is_run,
        _read_run,
    ),
    _Format("a .npz file of a ViT", vit_npz.matches, lambda path, _: weights.read_npz(path)),
    _Format(
        "the PREFIX of a published checkpoint, PREFIX.index",
        weights.is_published,
        lambda path, _: weights.read_published(path),
    ),
)
