"""A folder of images with one sub-folder per class.

PATH/CLASS/...              not split: 80% of the images are train, 10% validation, 10% test
PATH/train/CLASS/...        split into folders: train, validation (or val), test; without a
                            folder for validation, 10% of train
"""

import os
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from vmoe.config.data import Check, OnError
from vmoe.data.check import unreadable
from vmoe.data.decode import SUFFIXES, Found, ImageFile, image_files_below
from vmoe.data.sources.files import FileSource
from vmoe.data.sources.source import Skipped
from vmoe.data.sources.splits import SPLITS, hashed_split, resolve_split
from vmoe.errors import UsageError, listed

LISTED = 20  # unreadable images that an error names


def open_folder(
    path: str, split: str, *, check: Check = "headers", on_error: OnError = "fail"
) -> FileSource:
    """Opens a split of a folder of images, after checking that they can be read.

    Args:
        path: the folder.
        split: "train", "validation" or "test".
        check: how the images are checked, see ``vmoe/data/check.py``.
        on_error: whether unreadable images are an error. With "replace" they are kept in the split
            "train", where another image takes their place, and left out of the others.

    Raises:
        UsageError: there is no such folder or split, a class without images, or an image that
            cannot be read.
    """
    root, place = Path(path), f"folder:{path}"
    if not root.is_dir():
        raise UsageError(f"{place}: no such folder")
    available = {name: folder for name in SPLITS if (folder := _split_folder(root, name))}
    stored_split, fractions = resolve_split(split, list(available), place)
    folder = available[stored_split] if stored_split else root
    class_names = _class_names(available.get("train", folder))
    found = _find(folder, class_names)
    images = [image for each in found.values() for image in each.images]
    bad = unreadable(folder, images, check)
    if bad and on_error == "fail":
        raise UsageError(_listed(place, bad, len(images)))
    source = _source(folder, class_names, found, f"{place}:{split}", bad)
    if fractions:
        index = hashed_split(
            source.files, source.labels, fractions, class_names=class_names, place=place
        )[split]
        source = source.select(index)
    if bad and split != "train":
        readable = [i for i, file in enumerate(source.files) if str(folder / file) not in bad]
        if not readable:
            raise UsageError(f"{place}: no image of the split {split!r} can be read")
        source = source.select(np.array(readable, int))
    return source


def _split_folder(root: Path, split: str) -> Path | None:
    folders = [root / name for name in (split, *(["val"] if split == "validation" else []))]
    return next((folder for folder in folders if folder.is_dir()), None)


def _class_names(folder: Path) -> tuple[str, ...]:
    names = sorted(e.name for e in os.scandir(folder) if e.is_dir() and e.name[0] != ".")
    if not names:
        raise UsageError(f"{folder}: no sub-folders; put the images of each class into one")
    for name in names:
        try:
            name.encode()
        except UnicodeEncodeError:
            raise UsageError(
                f"{folder}: the name of class {os.fsencode(name)!r} is not UTF-8; rename its folder"
            ) from None
    return tuple(names)


def _find(folder: Path, class_names: Sequence[str]) -> dict[str, Found]:
    """The files of each class in a folder."""
    if unknown := sorted(set(_class_names(folder)) - set(class_names)):
        raise UsageError(
            f"{folder}: class {unknown[0]!r} has no folder in the training split; add one, or "
            "remove the class"
        )
    found = {name: image_files_below(folder / name) for name in class_names}
    for name, files in found.items():
        if (folder / name).is_dir() and not files.images:
            raise UsageError(
                f"{folder / name}: no images in it ({', '.join(SUFFIXES)}); add some, or remove it"
            )
    return found


def _source(
    folder: Path,
    class_names: tuple[str, ...],
    found: dict[str, Found],
    name: str,
    bad: dict[str, str],
) -> FileSource:
    """Every image of a folder."""
    images: list[ImageFile] = [image for files in found.values() for image in files.images]
    counts = [len(files.images) for files in found.values()]
    return FileSource(
        name=name,
        folder=str(folder),
        files=tuple(os.path.relpath(image.path, folder) for image in images),
        labels=np.repeat(np.arange(len(class_names)), counts),
        sizes=np.array([image.size for image in images], np.int64),
        times=np.array([image.modified for image in images], np.int64),
        class_names=class_names,
        skipped=Skipped(
            others=tuple(path for files in found.values() for path in files.others),
            links=tuple(path for files in found.values() for path in files.links),
            unreadable=frozenset(bad),
        ),
    )


def _listed(place: str, bad: dict[str, str], count: int) -> str:
    """One line that names the unreadable images."""
    reasons = [f"{path} ({reason})" for path, reason in bad.items()]
    named = listed(reasons, LISTED, separator="; ")
    return (
        f"{place}: {len(bad)} of {count} images cannot be read: {named}. Repair or remove them, "
        "or set data.on_error=replace"
    )
