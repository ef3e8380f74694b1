"""A folder of images with one sub-folder per class.

PATH/CLASS/...              not split: 80% train, 10% validation, 10% test, on average
PATH/train/CLASS/...        split into folders: train, validation, test, or as ``splits.py`` lists
                            them (val, Valid, dev, ...); without one for validation, 10% of train

The class names are the names of the folders in the training split, in alphabetical order. The
names, sizes and times of the files are kept in an index (``index.py``). Opening the data set walks
the folder once, and compares it with the index.
"""

import functools
import hashlib
import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
from jaxtyping import Int

from vmoe.config.data import CHECKS, ImageChecks
from vmoe.data.files import SUFFIXES, entries_of, image_files_below, is_folder
from vmoe.data.sources.index import IndexWriter, cached
from vmoe.data.sources.source import NAMED
from vmoe.data.sources.splits import SPLITS, WORDS, named_splits, resolve_split
from vmoe.data.sources.table import FileSource, finish_table, open_files
from vmoe.errors import UsageError
from vmoe.host.progress import progress

SEPARATOR = "\0"  # no path contains it


def open_folder(
    path: str, splits: Sequence[str], checks: ImageChecks = CHECKS, *, whole: bool = False
) -> list[FileSource]:
    """Opens splits of a folder of images, after checking that they can be read.

    Args:
        whole: a split is all of the images, of a folder that is not split.
    """

    @functools.cache
    def walk(folder: Path, class_names: tuple[str, ...]) -> list[_Class]:
        with progress(f"walking through {folder}", None, first=""):
            return list(_walk(folder, class_names))

    return [_open(Path(path), f"folder:{path}", split, checks, whole, walk) for split in splits]


def _open(
    root: Path,
    place: str,
    split: str,
    checks: ImageChecks,
    whole: bool,
    walk: Callable[[Path, tuple[str, ...]], "list[_Class]"],
) -> FileSource:
    available = split_folders(root)
    if whole and available:
        names = ", ".join(folder.name for folder in available.values())
        raise UsageError(f"{place}: is split into folders ({names}); give one of them as a whole")
    stored_split, fractions = ("", {}) if whole else resolve_split(split, [*available], place)
    folder = available[stored_split] if stored_split else root
    class_names = _class_names(available.get("train", folder))
    beside = _beside(root, folder, available.values())
    classes = walk(folder, class_names)
    key = hashlib.sha256(repr((class_names, fractions, beside)).encode(errors="surrogateescape"))
    for each in classes:
        key.update(repr((len(each.sizes), *each[3:])).encode(errors="surrogateescape"))
        key.update(b"".join((each.paths, each.sizes.tobytes(), each.times.tobytes())))

    def build(target: Path) -> None:
        others = [path for each in classes for path in each.others]
        with IndexWriter(target) as table:
            for label, each in enumerate(classes):
                paths = os.fsdecode(each.paths).split(SEPARATOR) if each.paths else []
                table.append_texts("paths", paths)
                table.append_lists("labels", [(label,)] * len(paths))
                table.append("sizes", each.sizes)
                table.append("times", each.times)
            finish_table(
                table,
                class_names,
                place=place,
                fractions=fractions,
                others=others[:NAMED],
                more_others=sum(each.more_others for each in classes) + len(others[NAMED:]),
                links=[path for each in classes for path in each.links],
                beside=beside[:NAMED],
                more_beside=len(beside[NAMED:]),
            )

    index = cached(f"folder:{os.path.realpath(folder)}", key.hexdigest(), build)
    return open_files(place, str(folder), index, split, checks)


def split_folders(root: Path) -> dict[str, Path]:
    """The folders of splits in a folder, by split.

    Folders called train, validation, val or test are splits. Folders with other names of splits,
    such as Train or dev, are classes if none of them has sub-folders and there are further folders.
    """
    if not root.is_dir():
        raise UsageError(f"folder:{root}: no such folder")
    folders = _folders(root)
    words = [name for name in folders if name.lower() in WORDS]
    sure = any(name in (*SPLITS, "val") or _folders(root / name) for name in words)
    named = named_splits(words if sure or words == folders else [], f"folder:{root}")
    return {split: root / name for split, name in named.items()}


def _folders(folder: Path) -> list[str]:
    """The names of the sub-folders; hidden ones are left out."""
    return sorted(entry.name for entry in entries_of(folder) if is_folder(entry))


def _class_names(folder: Path) -> tuple[str, ...]:
    names = _folders(folder)
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


def _beside(root: Path, folder: Path, splits: Iterable[Path]) -> list[str]:
    """Folders and images next to the folders of the splits or of the classes; they are not read.

    The paths are relative to the folder of the split.
    """
    used = {path.name for path in splits}
    around = [*_folders(root), *_images(root)] if used else []
    others = [os.path.join(os.pardir, name) for name in around if name not in used]
    return [*others, *_images(folder)]


def _images(folder: Path) -> list[str]:
    """The names of the image files directly in a folder."""
    return sorted(
        entry.name
        for entry in entries_of(folder)
        if os.path.splitext(entry.name)[1].lower() in SUFFIXES and not is_folder(entry)
    )


class _Class(NamedTuple):
    """The files of a class, with paths from the parent of its folder, however it is spelled.

    Attributes:
        paths: paths of the images, in order, with a SEPARATOR between them.
        others: files that are not images (only the first few).
        more_others: number of further files that are not images.
        links: symbolic links to folders.
    """

    paths: bytes
    sizes: Int[np.ndarray, "b"]
    times: Int[np.ndarray, "b"]
    others: list[str]
    more_others: int
    links: list[str]


def _walk(folder: Path, class_names: Sequence[str]) -> Iterator[_Class]:
    """The files of each class, in the order of the classes."""
    if unknown := sorted(set(_class_names(folder)) - set(class_names)):
        raise UsageError(
            f"{folder}: class {unknown[0]!r} has no folder in the training split; add one, or "
            "remove the class"
        )
    for name in class_names:
        images, others, links = image_files_below(folder / name)
        if (folder / name).is_dir() and not images:
            raise UsageError(
                f"{folder / name}: no images in it ({', '.join(SUFFIXES)}); add some, or remove it"
            )
        start = len(str(folder / name)) - len(name)
        yield _Class(
            os.fsencode(SEPARATOR.join(image.path[start:] for image in images)),
            np.array([image.size for image in images], np.int64),
            np.array([image.modified for image in images], np.int64),
            [path[start:] for path in others[:NAMED]],
            len(others[NAMED:]),
            [path[start:] for path in links],
        )
