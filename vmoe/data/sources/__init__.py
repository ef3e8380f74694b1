"""Data sets by name: ``KINDS`` lists them, and each has a module with the details.

To name a split as well, append ``:train``, ``:validation`` or ``:test``, for TFDS also a slice,
such as ``:train[:99%]``. Names, labels and sizes of all files are kept in indexes in the user's
cache folder, which processes share (``index.py``).
"""

import os
import pkgutil
import re
from collections.abc import Iterable, Iterator, Sequence
from typing import NamedTuple

from vmoe.config.data import CHECKS, ImageChecks
from vmoe.data.sources.source import NAMED, Example, Fingerprint, Skipped, Source
from vmoe.data.sources.splits import SPLITS
from vmoe.data.sources.views import relabel, sample
from vmoe.errors import UsageError, listed, unknown

__all__ = [
    "KINDS",
    "SPLITS",
    "Example",
    "Fingerprint",
    "ImageChecks",
    "Source",
    "has_files",
    "sample",
    "name_and_split",
    "open_source",
    "open_splits",
    "relabel",
    "skipped_messages",
]


class Kind(NamedTuple):
    """A kind of data set.

    Attributes:
        opener: MODULE:FUNCTION in this package, imported when needed. The function takes the text
            after the name (the name itself if there is none) and a split, and returns a ``Source``;
            for ``files`` several splits and the ``ImageChecks``, and returns a list.
        path: form of the text after the name, in brackets if it is optional; empty for none.
        images: short description of the images.
        classes: where the class names come from.
        files: whether the images are files; they are checked when the data set is opened.
    """

    opener: str
    path: str
    images: str
    classes: str
    files: bool = False

    @property
    def needs_path(self) -> bool:
        """Whether the name needs a path."""
        return self.path.startswith(":")


# fmt: off
KINDS = {
    "digits": Kind("builtin:open_digits", "", "1,797 of 8 x 8 pixels", "the ten digits"),
    "fashion_mnist": Kind("fashion_mnist:open_fashion_mnist", "[:FOLDER]",
                          "70,000 of 28 x 28 pixels", "ten kinds of clothing"),
    "fashion_mnist_sample": Kind("builtin:open_sample", "", "512 test images of these", "as above"),
    "emoji_sample": Kind("builtin:open_sample", "", "128 of 64 x 64 pixels", "nine categories"),
    "folder": Kind("folder:open_folder", ":PATH", "in one sub-folder per class", "the sub-folders",
                   files=True),
    "manifest": Kind("manifest:open_manifest", ":FILE", "listed in a .csv or .jsonl file",
                     "classes.txt, or the labels", files=True),
    "tar": Kind("tar:open_tar", ":FOLDER_OR_PATTERN", "WebDataset's shards",
                "classes.txt, or the labels"),
    "tfds": Kind("tfds:open_tfds", ":NAME_OR_PATH", "TFDS in ArrayRecord form", "its ClassLabel"),
    "hf": Kind("hf:open_hf", ":FOLDER", "Hugging Face, by save_to_disk",
               "its ClassLabel, or numbers"),
    "arrays": Kind("arrays:open_arrays", ":FILE_OR_FOLDER", "NumPy arrays",
                   "class_names, or numbers"),
    "synthetic": Kind("builtin:open_synthetic", ":ITEMS[:SIZE[:CLASSES]]", "random colors",
                      "numbers"),
}
# fmt: on
__doc__ = f"{__doc__ or ''}\n" + "\n".join(
    f"    {name + each.path:33}{each.images:33}{each.classes}" for name, each in KINDS.items()
)
# A split of TFDS begins with a letter, a version with a digit.
TFDS = re.compile(r"(?P<name>tfds:[^:]+(:\d[^:]*)?)(:(?P<split>[A-Za-z].*))?")


def open_source(name: str, split: str, checks: ImageChecks = CHECKS) -> Source:
    """Opens a split of a data set.

    Args:
        name: as ``KINDS`` lists them, without a split.
        split: "train", "validation" or "test"; for TFDS any of its splits and slices.
        checks: how the images of a folder or a list are checked.

    Raises:
        UsageError: there is no such data set or split, or its files are missing or corrupt.
    """
    return open_splits(name, [split], checks)[0]


def open_splits(name: str, splits: Sequence[str], checks: ImageChecks = CHECKS) -> list[Source]:
    """Opens splits of a data set at once, so that a folder is walked once; see ``open_source``."""
    name, _, path = name.partition(":")
    kind = _kind(name, path)
    for split in splits:
        if split not in SPLITS and name != "tfds":
            raise UsageError(unknown("no split", split, list(SPLITS)))
    try:
        opener = pkgutil.resolve_name(f"{__name__}.{kind.opener}")
        path = os.path.expanduser(path) if kind.path else name
        return (
            opener(path, splits, checks) if kind.files else [opener(path, each) for each in splits]
        )
    except PermissionError as error:
        raise UsageError(f"{error.filename}: {error.strerror}; make it readable") from None


def has_files(source: Source) -> bool:
    """Whether the images of a source are files, which are checked when it is opened."""
    kind = KINDS.get(source.name.partition(":")[0])
    return kind is not None and kind.files


def _kind(name: str, path: str) -> Kind:
    kind = KINDS.get(name)
    if kind is None and os.path.isdir(name):
        raise UsageError(f"no data set {name!r}: for the images of this folder, use folder:{name}")
    if kind is None:
        raise UsageError(unknown("no data set", name, list(KINDS)))
    if not kind.path and path in SPLITS:
        raise UsageError(f"{name}:{path}: no split {path!r} can be given here; use {name!r}")
    if not kind.path and path:
        raise UsageError(unknown("no split", path, list(SPLITS)))
    if kind.needs_path and not path:
        raise UsageError(f"data set {name!r} needs a path: {name}{kind.path}")
    return kind


def name_and_split(text: str) -> tuple[str, str]:
    """Parses NAME[:SPLIT] into its name and split; the split is "" if there is none.

    >>> name_and_split("digits:test"), name_and_split("folder:my/photos")
    (('digits', 'test'), ('folder:my/photos', ''))
    >>> name_and_split("tfds:imagenet2012:5.1.0:train[:99%]")
    ('tfds:imagenet2012:5.1.0', 'train[:99%]')
    """
    if found := TFDS.fullmatch(text):
        return found["name"], found["split"] or ""
    name, _, split = text.rpartition(":")
    path_missing = name in KINDS and KINDS[name].needs_path
    return (name, split) if split in SPLITS and name and not path_missing else (text, "")


def skipped_messages(sources: Iterable[Source | Skipped]) -> Iterator[str]:
    """One line for each kind of path that sources skip; each path is listed once.

    >>> list(skipped_messages([Skipped(others=("a.txt",)), Skipped(others=("a.txt",))]))
    ['skipped 1 file that is not an image: a.txt']
    """
    skipped = {each if isinstance(each, Skipped) else each.skipped for each in sources}
    for field, one, several in (
        ("others", "skipped {} file that is not an image", "skipped {} files that are not images"),
        ("beside", "skipped {} path next to", "skipped {} paths next to"),
        ("links", "skipped {} symbolic link to a folder", "skipped {} symbolic links to folders"),
        ("unreadable", "{} image cannot be read", "{} images cannot be read"),
    ):
        paths = sorted({path for each in skipped for path in getattr(each, field)})
        # The splits of one folder have the same files.
        unnamed = {(getattr(each, field), getattr(each, f"more_{field}", 0)) for each in skipped}
        more = sum(number for _, number in unnamed)
        if paths:
            count = len(paths) + more
            what = (one if count == 1 else several).format(f"{count:,}")
            where = " the folders of the classes or splits" if field == "beside" else ""
            yield f"{what}{where}: {listed(paths, NAMED, unnamed=more)}"
