"""Our format for sharing: a folder with ``model.safetensors`` and ``config.json``.

Parameters have our paths as names. Large models are split into files with a common index, as
Hugging Face does. config.json has the format's version, the model, its class names, preprocessing
and origin, and the SHA-256 of each file.
"""

import contextlib
import hashlib
import json
import os
import types
import typing
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from safetensors import SafetensorError
from safetensors.numpy import save_file

from vmoe.checkpoints import safetensors_files
from vmoe.checkpoints.arrays import ArrayFile, corrupt
from vmoe.checkpoints.assemble import check_shapes
from vmoe.checkpoints.card import UNKNOWN, Facts, card
from vmoe.checkpoints.family import WRONG, Family
from vmoe.checkpoints.older import current_name
from vmoe.checkpoints.stored import Origin, StoredModel
from vmoe.config import ViTConfig, from_json, to_json
from vmoe.config.preprocessing import Preprocessing
from vmoe.config.train import Loss
from vmoe.errors import Failure, UsageError, writing
from vmoe.host.retry import open_retried
from vmoe.host.signals import unfinished
from vmoe.trees import by_name
from vmoe.workdir.layout import replace_text

VERSION = 1
CONFIG, MODEL, CARD = "config.json", "model.safetensors", "README.md"
SHARD = 2_000_000_000  # bytes of a file, unless one array has more


def family(file: ArrayFile, config: Mapping[str, Any]) -> Family:
    """A model of ours, with the content of its config.json; checks the SHA-256 of each file."""
    place = file.path.with_name(CONFIG)
    if config.get("version") != VERSION:
        raise UsageError(
            f"{place.parent}: format version {config.get('version')!r:.20}, this version of vmoe "
            f"reads {VERSION}; use the version that wrote it"
        )
    try:
        model = from_json(ViTConfig, json.dumps(config["model"]))
        sums = {path: config["sha256"][path.name] for path in safetensors_files.files(file.path)}
        for path, expected in sums.items():
            if sha256(path) != expected:
                raise corrupt(path, f"its SHA-256 differs from the one in {CONFIG}")
        check_shapes({current_name(x): info.shape for x, info in file.infos.items()}, model)
        loss = config.get("loss", "softmax")  # older versions did not write it
        if loss not in typing.get_args(Loss):
            raise ValueError(f"loss {loss!r:.20}")
        if type(step := config["step"]) not in (int, types.NoneType):
            raise ValueError(f"step {step!r:.20}")
        preprocessing = from_json(Preprocessing, json.dumps(config["preprocessing"]))
        origin = config["origin"]
        copied_from = origin.get("copied_from") or origin["format"]  # older versions: only format
        return Family(
            Origin("vmoe", file.path, copied_from=copied_from),
            file,
            lambda name, shape: {current_name(name): np.asarray},
            lambda image_size: (preprocessing, []),
            config=model,
            class_names=_class_names(config["class_names"], model.num_classes),
            step=step,
            loss=loss,
        )
    except KeyError as error:
        raise corrupt(place, f"it has no {error}") from None
    except WRONG as error:
        raise corrupt(place, error) from None


def _class_names(names: Any, classes: int) -> tuple[str, ...]:
    if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
        raise ValueError("class_names is not a list of strings")
    if len(names) > classes:
        raise ValueError(f"{len(names)} class names of {classes} classes")
    return tuple(names)


def write(
    folder: Path, stored: StoredModel, *, facts: Facts = UNKNOWN, shard_bytes: int = SHARD
) -> None:
    """Writes a model with a card; config.json is written last.

    Args:
        folder: a new or an empty one; its name is the title of the card.
        facts: for the card.
        shard_bytes: largest size of a file of parameters; only a single larger array exceeds it.
    """
    arrays = {name: np.asarray(leaf) for name, leaf in by_name(stored.params).items()}
    with new_folder(folder):
        files = write_arrays(folder, arrays, shard_bytes)
        text = card(folder.name, stored, arrays, facts)
        (folder / CARD).write_text(text, encoding="utf-8")
        write_config(folder, stored, {"format": "vmoe", "version": VERSION}, files)


@contextlib.contextmanager
def new_folder(folder: Path) -> Iterator[None]:
    """Makes a folder, in which the context writes files; after an error nothing of it is left."""
    check_empty(folder)
    with writing(folder), unfinished(folder):
        folder.mkdir(parents=True, exist_ok=True)
        yield


def write_config(
    folder: Path, stored: StoredModel, content: Mapping[str, Any], files: Sequence[str]
) -> None:
    """Writes config.json: the content, what belongs to the model, and the SHA-256 of files."""
    content = dict(content) | {
        "model": json.loads(to_json(stored.config)),
        "class_names": stored.class_names,
        "preprocessing": json.loads(to_json(stored.preprocessing)),
        "step": stored.step,
        "loss": stored.loss,
        "origin": stored.origin._asdict() | {"path": str(stored.origin.path)},
        "sha256": {name: sha256(folder / name) for name in files},
    }
    replace_text(folder / CONFIG, json.dumps(content, indent=2))


def check_empty(folder: Path) -> None:
    """Checks that a folder can be written: that it does not exist, or has no files."""
    if folder.exists() and not folder.is_dir():
        raise UsageError(f"{folder}: it is a file; use another folder")
    if folder.exists() and any(folder.iterdir()):
        raise UsageError(f"{folder}: it is not empty; use another folder")


def write_arrays(folder: Path, arrays: Mapping[str, np.ndarray], shard_bytes: int) -> list[str]:
    """Writes arrays by path, to several files with an index if they have more than some bytes.

    Returns:
        the names of the files.
    """
    shards: list[dict[str, np.ndarray]] = [{}]
    for name, array in arrays.items():
        if shards[-1] and sum(x.nbytes for x in shards[-1].values()) + array.nbytes > shard_bytes:
            shards.append({})
        shards[-1][name] = np.asarray(array, order="C")
    if len(shards) == 1:
        _save(shards[0], folder / MODEL)
        return [MODEL]
    names = [f"model-{i + 1:05d}-of-{len(shards):05d}.safetensors" for i in range(len(shards))]
    for name, shard in zip(names, shards, strict=True):
        _save(shard, folder / name)
    places = {name: file for file, shard in zip(names, shards, strict=True) for name in shard}
    size = sum(array.nbytes for array in arrays.values())
    index = {"metadata": {"total_size": size}, "weight_map": places}
    (folder / (MODEL + safetensors_files.INDEX)).write_text(json.dumps(index, indent=2))
    return [*names, MODEL + safetensors_files.INDEX]


def _save(arrays: dict[str, np.ndarray], path: Path) -> None:
    """Writes a file with the permissions of any new file; safetensors lets only its owner read."""
    try:
        save_file(arrays, path)
    except SafetensorError as error:  # a full disk, for example
        raise OSError(str(error)) from None
    os.umask(mask := os.umask(0))
    path.chmod(0o666 & ~mask)


def sha256(path: Path) -> str:
    try:
        with open_retried(path) as file:
            return hashlib.file_digest(file, "sha256").hexdigest()
    except OSError as error:
        raise Failure(f"{path}: {error.strerror}") from None
