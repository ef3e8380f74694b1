"""Trained models as files. Only ``read`` chooses the reader of a path.

A reader is a function from a path to a ``StoredModel``; ``_FORMATS`` has an entry per format.
"""

import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal, NamedTuple

from flax import nnx

from vmoe import models
from vmoe.checkpoints.run import CorruptCheckpoint, find, is_run, restore
from vmoe.config import TrainConfig, ViTConfig
from vmoe.config.evaluation import Weights
from vmoe.config.preprocessing import Preprocessing
from vmoe.errors import Failure, UsageError
from vmoe.workdir.layout import CHECKPOINTS, read_class_names, read_config


class Origin(NamedTuple):
    """Where the parameters of a model come from.

    Attributes:
        format: of the files.
        path: as passed to ``read``.
        weights: which parameters of a run were read.
    """

    format: Literal["run"]
    path: Path
    weights: Weights


class StoredModel(NamedTuple):
    """What a reader returns.

    Attributes:
        config: of the model, as it was trained.
        params: the parameters, as nested dicts.
        class_names: in the order of the logits.
        preprocessing: how images are prepared for the model.
        step: number of training steps.
        origin: where the parameters come from.
        train_config: config of the training run; None if the files do not come from a run.
    """

    config: ViTConfig
    params: dict[str, Any]
    class_names: tuple[str, ...]
    preprocessing: Preprocessing
    step: int
    origin: Origin
    train_config: TrainConfig | None


def read(path: str | Path, *, use_ema: bool = True) -> StoredModel:
    """Reads a trained model.

    Given a run folder, reads the newest intact checkpoint and reports each newer corrupt one on
    stderr.

    Args:
        path: a run folder, or ``checkpoints/STEP``, ``checkpoints/best`` or ``checkpoints/last``
            in one.
        use_ema: read the moving average of the parameters, if the run has one.

    Raises:
        UsageError: there is no trained model at the path.
        Failure: all checkpoints that the path names are corrupt.
    """
    path = Path(path)
    for supported in _FORMATS:
        if supported.matches(path):
            return supported.read(path, use_ema)
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


_FORMATS = (
    _Format(
        "a run folder (it has config.json), or its checkpoints/STEP, checkpoints/best or "
        "checkpoints/last",
        is_run,
        _read_run,
    ),
)
