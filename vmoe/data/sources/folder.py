"""A folder of images with one sub-folder per class.

PATH/CLASS/...              not split: 80% of each class is train, 10% validation, 10% test
PATH/train/CLASS/...        split into folders: train, validation (or val), test; without a
                            folder for validation, 10% of train
"""

import dataclasses
import os
from pathlib import Path

import numpy as np

from vmoe.data.decode import SUFFIXES, image_files_below
from vmoe.data.sources.files import FileSource
from vmoe.data.sources.splits import SPLITS, resolve_split, stratified_split
from vmoe.errors import UsageError


def open_folder(path: str, split: str) -> FileSource:
    """Opens a split of a folder of images.

    Args:
        path: the folder.
        split: "train", "validation" or "test".

    Raises:
        UsageError: there is no such folder or split, or a class without images.
    """
    root, place = Path(path), f"folder:{path}"
    if not root.is_dir():
        raise UsageError(f"{place}: no such folder")
    available = {name: folder for name in SPLITS if (folder := _split_folder(root, name))}
    stored_split, fractions = resolve_split(split, list(available), place)
    folder = available[stored_split] if stored_split else root
    class_names = _class_names(available.get("train", folder))
    source = _read(folder, class_names, f"{place}:{split}")
    if not fractions:
        return source
    index = stratified_split(source.labels, fractions, class_names=class_names, place=place)[split]
    files = tuple(source.files[i] for i in index)
    return dataclasses.replace(source, files=files, labels=source.labels[index])


def _split_folder(root: Path, split: str) -> Path | None:
    folders = [root / name for name in (split, *(["val"] if split == "validation" else []))]
    return next((folder for folder in folders if folder.is_dir()), None)


def _class_names(folder: Path) -> tuple[str, ...]:
    names = sorted(e.name for e in os.scandir(folder) if e.is_dir() and e.name[0] != ".")
    if not names:
        raise UsageError(f"{folder}: no sub-folders; put the images of each class into one")
    return tuple(names)


def _read(folder: Path, class_names: tuple[str, ...], name: str) -> FileSource:
    """Every image of the given classes in a folder."""
    if unknown := sorted(set(_class_names(folder)) - set(class_names)):
        raise UsageError(
            f"{folder}: class {unknown[0]!r} has no folder in the training split; add one, or "
            "remove the class"
        )
    files: list[str] = []
    labels: list[int] = []
    skipped = 0
    for label, class_name in enumerate(class_names):
        images, others = image_files_below(folder / class_name)
        if (folder / class_name).is_dir() and not images:
            raise UsageError(
                f"{folder / class_name}: no images in it ({', '.join(SUFFIXES)}); add some, or "
                "remove it"
            )
        files += (str(image.relative_to(folder)) for image in images)
        labels += [label] * len(images)
        skipped += others
    return FileSource(name, str(folder), tuple(files), np.array(labels), class_names, skipped)
