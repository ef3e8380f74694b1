"""The cache folder for downloads, results of checks and programs; and atomic writes of files."""

import contextlib
import hashlib
import os
import platform
import re
import sys
import tempfile
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from vmoe.host.cores import cores
from vmoe.host.signals import temporary_folder

MOST_PROGRAMS = 4 << 30  # bytes of compiled programs
TEMPORARY = ".vmoe-"  # prefix of temporary folders; only a kill leaves one behind


def cache_folder() -> Path:
    """``vmoe`` in the user's cache folder, or in the temporary folder if there is no home."""
    folder = Path(os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache"))
    return (folder if folder.is_absolute() else Path(tempfile.gettempdir())) / "vmoe"


def keep_programs() -> None:
    """Lets JAX keep compiled programs in the cache folder, unless JAX_COMPILATION_CACHE_DIR is set.

    Call it before JAX is imported. The folder is one for processors with the same instructions and
    as many cores, since a program may use all of them. The oldest programs are removed when all
    take more than ``MOST_PROGRAMS``. Programs that are cut off are replaced.
    """
    if "JAX_COMPILATION_CACHE_DIR" in os.environ:
        return
    root = cache_folder() / "programs"
    folder = root / _processor()
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError:  # it cannot be written, so none are kept
        return
    if os.access(folder, os.W_OK):
        os.environ["JAX_COMPILATION_CACHE_DIR"] = str(folder)
        _replace_broken(folder)
    found = list[tuple[float, int, Path]]()
    for path in root.glob("*/*"):
        with contextlib.suppress(OSError):  # another process has removed it
            status = path.stat()
            found.append((status.st_mtime, status.st_size, path))
    total = sum(size for _, size, _ in found)
    for _, size, path in sorted(found):
        if total <= MOST_PROGRAMS:
            break
        with contextlib.suppress(OSError):
            path.unlink()
        total -= size


def _replace_broken(folder: Path) -> None:
    """Removes cached programs that JAX cannot read, when it says so.

    A kill or a full disk cuts them off. JAX would then compile them at each start, since it writes
    no program of which there is a file.
    """
    show = warnings.showwarning

    def remove(*warning: Any, **more: Any) -> None:
        text = str(warning[0])
        broken = re.match(r"Error reading persistent compilation cache .* '(.*?)':", text)
        if not broken:
            return show(*warning, **more)
        with contextlib.suppress(OSError):
            for path in folder.glob(f"{broken[1]}-*"):
                path.unlink(missing_ok=True)
        line = f"{folder}: the compiled program {broken[1]} is cut off; compiled again"
        with contextlib.suppress(OSError):
            print(line, file=sys.stderr)

    warnings.showwarning = remove


def _processor() -> str:
    """A name for all processors with the instructions and the number of cores of this one."""
    flags = platform.processor()
    with contextlib.suppress(OSError), open("/proc/cpuinfo") as file:  # only its first processor
        flags = next((line for line in file if line.startswith(("flags", "Features"))), flags)
    text = f"{platform.machine()} {cores()} {flags}"
    return hashlib.sha256(text.encode()).hexdigest()[:16]


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
