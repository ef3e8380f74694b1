"""The folder that keeps downloads and the results of checks between runs."""

import os
import tempfile
from pathlib import Path


def cache_folder() -> Path:
    """``vmoe`` in the user's cache folder, or in that of temporary files if there is no home."""
    folder = Path(os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache"))
    return (folder if folder.is_absolute() else Path(tempfile.gettempdir())) / "vmoe"
