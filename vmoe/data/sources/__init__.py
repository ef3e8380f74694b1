"""Data sets by name.

    name                             images                              class names
    digits                           1,797 of 8 x 8 pixels               the ten digits
    fashion_mnist[:FOLDER]           70,000 of 28 x 28 pixels            ten kinds of clothing
    fashion_mnist_sample             512 test images of these            as above
    emoji_sample                     128 of 64 x 64 pixels               nine categories
    folder:PATH                      in one sub-folder per class         the sub-folders
    manifest:FILE                    listed in a .csv or .jsonl file     classes.txt, or the labels
    tar:FOLDER_OR_PATTERN            WebDataset's shards                 classes.txt, or the labels
    tfds:NAME_OR_PATH                TFDS in ArrayRecord form            its ClassLabel
    hf:FOLDER                        Hugging Face, by save_to_disk       its ClassLabel, or numbers
    arrays:FILE_OR_FOLDER            NumPy arrays                        class_names, or numbers
    synthetic:ITEMS[:SIZE[:CLASSES]] random colours                      numbers

The file of each source in this package says more. To name a split as well, append ``:train``,
``:validation`` or ``:test``, for TFDS also a slice, such as ``:train[:99%]``. What has to be known
of all examples is in indexes in the user's cache folder, which processes share (``index.py``).
"""

import re
from collections.abc import Iterable, Iterator

from vmoe.config.data import Check, OnError
from vmoe.data.sources.arrays import open_arrays
from vmoe.data.sources.digits import open_digits
from vmoe.data.sources.fashion_mnist import open_fashion_mnist
from vmoe.data.sources.folder import open_folder
from vmoe.data.sources.hf import open_hf
from vmoe.data.sources.manifest import open_manifest
from vmoe.data.sources.relabeled import relabel
from vmoe.data.sources.samples import NAMES, open_sample
from vmoe.data.sources.source import NAMED, Example, Fingerprint, Skipped, Source
from vmoe.data.sources.splits import SPLITS
from vmoe.data.sources.subset import sample
from vmoe.data.sources.synthetic import open_synthetic
from vmoe.data.sources.tar import open_tar
from vmoe.data.sources.tfds import open_tfds
from vmoe.errors import UsageError, listed, unknown

__all__ = [
    "SPLITS",
    "Example",
    "Fingerprint",
    "Source",
    "sample",
    "name_and_split",
    "open_source",
    "relabel",
    "skipped_messages",
]

# A split of TFDS begins with a letter, a version with a digit.
TFDS = re.compile(r"(?P<name>tfds:[^:]+(:\d[^:]*)?)(:(?P<split>[A-Za-z].*))?")

_WITHOUT_PATH = ("digits", *NAMES)
_WITH_PATH = ("folder", "manifest", "tar", "tfds", "hf", "arrays", "synthetic")
_KINDS = ("digits", "fashion_mnist", *NAMES, *_WITH_PATH)


def open_source(
    name: str, split: str, *, check: Check = "headers", on_error: OnError = "fail"
) -> Source:
    """Opens a split of a data set.

    Args:
        name: as above, without a split.
        split: "train", "validation" or "test"; for TFDS any of its splits and slices.
        check: how the images of a folder or a list are checked, see ``vmoe/data/check.py``.
        on_error: whether unreadable images in these are an error.

    Raises:
        UsageError: there is no such data set or split, or its files are missing or corrupt.
    """
    kind, path = _kind_and_path(name)
    if split not in SPLITS and kind != "tfds":
        raise UsageError(unknown("no split", split, list(SPLITS)))
    try:
        return _open(kind, path, split, check, on_error)
    except PermissionError as error:
        raise UsageError(f"{error.filename}: {error.strerror}; make it readable") from None


def _open(kind: str, path: str, split: str, check: Check, on_error: OnError) -> Source:
    files = {"folder": open_folder, "manifest": open_manifest}
    others = {
        "arrays": open_arrays,
        "fashion_mnist": open_fashion_mnist,
        "hf": open_hf,
        "synthetic": open_synthetic,
        "tar": open_tar,
        "tfds": open_tfds,
    }
    if kind in files:
        return files[kind](path, split, check=check, on_error=on_error)
    if kind in others:
        return others[kind](path, split)
    return open_digits(split) if kind == "digits" else open_sample(kind, split)


def _kind_and_path(name: str) -> tuple[str, str]:
    kind, _, path = name.partition(":")
    if kind not in _KINDS:
        raise UsageError(unknown("no data set", kind, list(_KINDS)))
    if kind in _WITHOUT_PATH and path in SPLITS:
        raise UsageError(f"{name}: no split {path!r} can be given here; use {kind!r}")
    if kind in _WITHOUT_PATH and path:
        raise UsageError(unknown("no split", path, list(SPLITS)))
    if kind in _WITH_PATH and not path:
        raise UsageError(f"data set {kind!r} needs a path: {kind}:PATH")
    return kind, path


def name_and_split(text: str) -> tuple[str, str]:
    """Parses NAME[:SPLIT] into its name and split; the split is "" if the text names none.

    >>> name_and_split("digits:test"), name_and_split("folder:my/photos")
    (('digits', 'test'), ('folder:my/photos', ''))
    >>> name_and_split("tfds:imagenet2012:5.1.0:train[:99%]")
    ('tfds:imagenet2012:5.1.0', 'train[:99%]')
    """
    if found := TFDS.fullmatch(text):
        return found["name"], found["split"] or ""
    name, _, split = text.rpartition(":")
    path_missing = name in _WITH_PATH
    return (name, split) if split in SPLITS and name and not path_missing else (text, "")


def skipped_messages(sources: Iterable[Source | Skipped]) -> Iterator[str]:
    """A line for each kind of path that sources skip; each path once.

    >>> list(skipped_messages([Skipped(others=("a.txt",)), Skipped(others=("a.txt",))]))
    ['skipped 1 file that is not an image: a.txt']
    """
    skipped = {each if isinstance(each, Skipped) else each.skipped for each in sources}
    others = sorted({path for each in skipped for path in each.others})
    beside = sorted({path for each in skipped for path in each.beside})
    links = sorted({path for each in skipped for path in each.links})
    unreadable = sorted({path for each in skipped for path in each.unreadable})
    # The splits of one folder have the same files.
    more = sum(number for _, number in {(each.others, each.more_others) for each in skipped})
    if others:
        count = len(others) + more
        what = "file that is not an image" if count == 1 else "files that are not images"
        yield f"skipped {count:,} {what}: {listed(others, NAMED, unnamed=more)}"
    more = sum(number for _, number in {(each.beside, each.more_beside) for each in skipped})
    if beside:
        count = len(beside) + more
        what = "path" if count == 1 else "paths"
        where = "beside the folders of the classes or splits"
        yield f"skipped {count:,} {what} {where}: {listed(beside, NAMED, unnamed=more)}"
    if links:
        what = "symbolic link to a folder" if len(links) == 1 else "symbolic links to folders"
        yield f"skipped {len(links)} {what}: {listed(links, NAMED)}"
    if unreadable:
        what = "image" if len(unreadable) == 1 else "images"
        yield f"{len(unreadable)} {what} cannot be read: {listed(unreadable, NAMED)}"
