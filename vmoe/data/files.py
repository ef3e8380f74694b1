"""Image files: finding them, and reading their bytes."""

import os
import stat
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple

from vmoe.errors import UsageError
from vmoe.host.retry import retried

SUFFIXES = (".png", ".jpg", ".jpeg", ".webp", ".bmp", ".gif", ".tif", ".tiff")


class ImageFile(NamedTuple):
    """A file with an image suffix.

    Attributes:
        path: path of the file.
        size: size in bytes; below 0 if there is no such file.
        modified: time of the last change of the content, in nanoseconds.
    """

    path: str
    size: int
    modified: int


def image_files_below(folder: str | Path) -> tuple[list[ImageFile], list[str], list[str]]:
    """Finds the image files in a folder and its sub-folders.

    Hidden files and folders are ignored.

    Returns:
        the files with an image suffix; all other files; and symbolic links to folders, which are
        not followed. Each list is sorted by path.
    """
    images, others, links = list[ImageFile](), list[str](), list[str]()
    for entry in entries_below(str(folder)):
        image = os.path.splitext(entry.name)[1].lower() in SUFFIXES
        status = _status(entry) if image or entry.is_symlink() else None
        if status and stat.S_ISDIR(status.st_mode):
            links.append(entry.path)
        elif status and image and stat.S_ISREG(status.st_mode):
            images.append(ImageFile(entry.path, status.st_size, status.st_mtime_ns))
        else:
            others.append(entry.path)
    return sorted(images), sorted(others), sorted(links)


def entries_of(folder: str | Path) -> list[os.DirEntry[str]]:
    """The entries of a folder that are not hidden."""
    entries = retried(folder, lambda: list(os.scandir(folder)))
    return [entry for entry in entries if not entry.name.startswith(".")]


def entries_below(folder: str) -> Iterator[os.DirEntry[str]]:
    """All files, and all links to folders, below a folder; hidden ones are left out."""
    try:
        entries = entries_of(folder)
    except FileNotFoundError:  # a class without images in this split
        return
    except OSError as error:
        message = f"{error.filename}: {error.strerror}; make it readable, or move it away"
        raise UsageError(message) from None
    for entry in entries:
        if entry.is_dir(follow_symlinks=False):
            yield from entries_below(entry.path)
        else:
            yield entry


def is_folder(entry: os.DirEntry[str]) -> bool:
    """Whether an entry is a folder, or a link to one."""
    status = _status(entry) if entry.is_symlink() else None
    return stat.S_ISDIR(status.st_mode) if status else entry.is_dir(follow_symlinks=False)


def _status(entry: os.DirEntry[str]) -> os.stat_result | None:
    """The status of an entry, with links followed; None for a broken link."""
    try:
        return retried(entry.path, entry.stat)
    except PermissionError:
        raise
    except OSError:
        return None


def read_bytes(path: str | Path, read: Callable[[Path], bytes] = Path.read_bytes) -> bytes:
    """The content of a file, as ``read`` reads it.

    Raises:
        UsageError: there is no such file, or it cannot be read.
        Failure: it cannot be read for a temporary reason.
    """
    try:
        return retried(path, lambda: read(Path(path)))
    except FileNotFoundError:
        raise UsageError(f"{path}: no such file") from None
    except (OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or error
        raise UsageError(f"{path}: cannot be read ({reason})") from None
