"""The cache folder for downloads and results of checks, and atomic writes of files."""

import contextlib
import os
import tempfile
from collections.abc import Iterator
from pathlib import Path

from vmoe.signals import temporary_folder

TEMPORARY = ".vmoe-"  # prefix of temporary folders; only a kill leaves one behind


def cache_folder() -> Path:
    """``vmoe`` in the user's cache folder, or in the temporary folder if there is no home."""
    folder = Path(os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache"))
    return (folder if folder.is_absolute() else Path(tempfile.gettempdir())) / "vmoe"


@contextlib.contextmanager
def atomic(path: Path) -> Iterator[Path]:
    """The path of a temporary file that replaces the file at the end, if there is no error.

    A kill or a power cut leaves either the old or the new content. Several processes may do this at
    once.
    """
    with temporary_folder(dir=path.parent, prefix=TEMPORARY) as folder:
        yield folder / path.name
        with (folder / path.name).open("rb") as file:
            os.fsync(file.fileno())
        os.replace(folder / path.name, path)
