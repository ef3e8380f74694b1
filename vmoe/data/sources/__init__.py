"""Data sets by name.

    digits                                  1,797 digits of 8 x 8 pixels
    fashion_mnist[:FOLDER]                  70,000 pieces of clothing of 28 x 28 pixels
    fashion_mnist_sample                    512 test images of these, which come with vmoe
    emoji_sample                            128 emoji of 64 x 64 pixels, which come with vmoe
    folder:PATH                             any images, in one sub-folder per class
    arrays:FILE.npz                         any images, in one NumPy file

To name a split as well, append ``:train``, ``:validation`` or ``:test``.
"""

from collections.abc import Iterable, Iterator

from vmoe.config.data import Check, OnError
from vmoe.data.sources.arrays import open_arrays
from vmoe.data.sources.digits import open_digits
from vmoe.data.sources.fashion_mnist import open_fashion_mnist
from vmoe.data.sources.folder import open_folder
from vmoe.data.sources.relabeled import relabel
from vmoe.data.sources.samples import NAMES, open_sample
from vmoe.data.sources.source import Example, Fingerprint, Skipped, Source
from vmoe.data.sources.splits import SPLITS
from vmoe.data.sources.subset import sample
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

NAMED = 5  # paths in a message

_WITHOUT_PATH = ("digits", *NAMES)
_KINDS = ("digits", "fashion_mnist", *NAMES, "folder", "arrays")


def open_source(
    name: str, split: str, *, check: Check = "headers", on_error: OnError = "fail"
) -> Source:
    """Opens a split of a data set.

    Args:
        name: "digits", "fashion_mnist", "fashion_mnist:FOLDER", "fashion_mnist_sample",
            "emoji_sample", "folder:PATH" or "arrays:FILE.npz".
        split: "train", "validation" or "test".
        check: how the images of a folder are checked, see ``vmoe/data/check.py``.
        on_error: whether unreadable images in a folder are an error.

    Raises:
        UsageError: there is no such data set or split, or its files are missing or corrupt.
    """
    kind, path = _kind_and_path(name)
    if split not in SPLITS:
        raise UsageError(unknown("no split", split, list(SPLITS)))
    try:
        match kind:
            case "digits":
                return open_digits(split)
            case "fashion_mnist":
                return open_fashion_mnist(path, split)
            case "fashion_mnist_sample" | "emoji_sample":
                return open_sample(kind, split)
            case "folder":
                return open_folder(path, split, check=check, on_error=on_error)
        return open_arrays(path, split)
    except PermissionError as error:
        raise UsageError(f"{error.filename}: {error.strerror}; make it readable") from None


def _kind_and_path(name: str) -> tuple[str, str]:
    kind, _, path = name.partition(":")
    if kind not in _KINDS:
        raise UsageError(unknown("no data set", kind, list(_KINDS)))
    if kind in _WITHOUT_PATH and path in SPLITS:
        raise UsageError(f"{name}: no split {path!r} can be given here; use {kind!r}")
    if kind in _WITHOUT_PATH and path:
        raise UsageError(unknown("no split", path, list(SPLITS)))
    if kind in ("folder", "arrays") and not path:
        raise UsageError(f"data set {kind!r} needs a path: {kind}:PATH")
    return kind, path


def name_and_split(text: str) -> tuple[str, str]:
    """Parses NAME[:SPLIT] into its name and split; the split is "" if the text names none.

    >>> name_and_split("digits:test"), name_and_split("folder:my/photos")
    (('digits', 'test'), ('folder:my/photos', ''))
    """
    name, _, split = text.rpartition(":")
    path_missing = name in ("folder", "arrays")
    return (name, split) if split in SPLITS and name and not path_missing else (text, "")


def skipped_messages(sources: Iterable[Source | Skipped]) -> Iterator[str]:
    """A line for each kind of path that sources skip; each path once.

    >>> list(skipped_messages([Skipped(others=("a.txt",)), Skipped(others=("a.txt",))]))
    ['skipped 1 file that is not an image: a.txt']
    """
    skipped = [each if isinstance(each, Skipped) else each.skipped for each in sources]
    others, links, unreadable = (
        sorted({path for paths in kind for path in paths}) for kind in zip(*skipped, strict=True)
    )
    if others:
        what = "file that is not an image" if len(others) == 1 else "files that are not images"
        yield f"skipped {len(others)} {what}: {listed(others, NAMED)}"
    if links:
        what = "symbolic link to a folder" if len(links) == 1 else "symbolic links to folders"
        yield f"skipped {len(links)} {what}: {listed(links, NAMED)}"
    if unreadable:
        what = "image" if len(unreadable) == 1 else "images"
        yield f"{len(unreadable)} {what} cannot be read: {listed(unreadable, NAMED)}"
