"""A folder of images sorted into one sub-folder per class.

PATH/CLASS/...              split by share: of each class 80% train, 10% validation, 10% test
PATH/train/CLASS/...        split by folder: train, validation (or val), test; validation is
                            taken out of train, 10%, where it has no folder
"""

import os
from pathlib import Path

import numpy as np

from vmoe.data.images import SUFFIXES
from vmoe.data.sources.source import SPLITS, Files, Source, shares
from vmoe.errors import UsageError


def open_folder(folder: str, split: str) -> Source:
    """A split of a folder of images.

    Raises:
        UsageError: no such folder or split, or a class without images.
    """
    root = Path(folder)
    if not root.is_dir():
        raise UsageError(f"folder:{folder}: no such folder")
    own = {name: path for name in SPLITS if (path := _split_folder(root, name))}
    if not own:
        parts = {"validation": 0.1, "test": 0.1}
        return _take_out(root, split, parts)
    if split == "train" and "validation" not in own and "train" in own:
        return _take_out(own["train"], split, {"validation": 0.1})
    if split == "validation" and split not in own and "train" in own:
        return _take_out(own["train"], split, {"validation": 0.1})
    if split not in own:
        raise UsageError(f"folder:{folder} has no part {split!r}, there are {', '.join(own)}")
    names = _classes(own.get("train", own[split]))
    return _read(own[split], names, f"folder:{folder}:{split}")


def _split_folder(root: Path, split: str) -> Path | None:
    folders = [root / name for name in ({"validation": "val"}.get(split), split) if name]
    return next((folder for folder in folders if folder.is_dir()), None)


def _take_out(folder: Path, split: str, parts: dict[str, float]) -> Source:
    whole = _read(folder, _classes(folder), f"folder:{folder}:{split}")
    index = shares(whole.labels, parts, names=whole.class_names, place=f"folder:{folder}")[split]
    paths = tuple(whole.images.paths[i] for i in index)
    return Source(whole.name, Files(paths), whole.labels[index], whole.class_names, whole.skipped)


def _classes(folder: Path) -> tuple[str, ...]:
    names = sorted(e.name for e in os.scandir(folder) if e.is_dir() and e.name[0] != ".")
    if not names:
        raise UsageError(f"{folder}: no sub-folders; images lie in one folder per class")
    return tuple(names)


def _read(folder: Path, names: tuple[str, ...], source: str) -> Source:
    """Every image of the classes that the folder has."""
    if strange := sorted(set(_classes(folder)) - set(names)):
        raise UsageError(f"{folder}: class {strange[0]!r} has no folder in the training part")
    paths: list[str] = []
    labels: list[int] = []
    skipped = 0
    for label, name in enumerate(names):
        files = [path for path in sorted((folder / name).rglob("[!.]*")) if path.is_file()]
        images = [str(path) for path in files if path.suffix.lower() in SUFFIXES]
        if (folder / name).is_dir() and not images:
            raise UsageError(
                f"{folder / name}: no images in it ({', '.join(SUFFIXES)}); add some or remove it"
            )
        paths += images
        labels += [label] * len(images)
        skipped += len(files) - len(images)
    return Source(source, Files(tuple(paths)), np.array(labels), names, skipped)
