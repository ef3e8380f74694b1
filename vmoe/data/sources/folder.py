"""A folder of images sorted into one sub-folder per class.

PATH/CLASS/...              split by share: of each class 80% train, 10% validation, 10% test
PATH/train/CLASS/...        split by folder: train, validation (or val), test; validation is
                            taken out of train, 10%, where it has no folder
"""

import dataclasses
import os
from pathlib import Path

import numpy as np

from vmoe.data.decode import SUFFIXES, image_files_below
from vmoe.data.sources.source import SPLITS, Files, Source, part_of, shares
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
    part, parts = part_of(split, list(own), f"folder:{folder}")
    place = own[part] if part else root
    names = _classes(own.get("train", place))
    whole = _read(place, names, f"folder:{folder}:{split}")
    if not parts:
        return whole
    index = shares(whole.labels, parts, names=names, place=f"folder:{folder}")[split]
    paths = tuple(whole.images.paths[i] for i in index)
    return dataclasses.replace(whole, images=Files(paths), labels=whole.labels[index])


def _split_folder(root: Path, split: str) -> Path | None:
    folders = [root / name for name in (split, *(["val"] if split == "validation" else []))]
    return next((folder for folder in folders if folder.is_dir()), None)


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
        images, others = image_files_below(folder / name)
        if (folder / name).is_dir() and not images:
            raise UsageError(
                f"{folder / name}: no images in it ({', '.join(SUFFIXES)}); add some or remove it"
            )
        paths += map(str, images)
        labels += [label] * len(images)
        skipped += others
    return Source(source, Files(tuple(paths)), np.array(labels), names, skipped)
