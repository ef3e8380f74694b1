"""Progress bars on stderr for work on a whole data set; none if stderr is not a terminal."""

from collections.abc import Iterable, Iterator
from contextlib import AbstractContextManager
from pathlib import Path
from typing import IO, Any, TypeVar

import rich.progress
from rich.console import Console

T = TypeVar("T")


def progress(items: Iterable[T], text: str, total: int) -> Iterator[T]:
    """Yields the items, and shows how many are done."""
    yield from rich.progress.track(items, text, total, **_terminal())


def open_text(path: Path) -> AbstractContextManager[IO[str]]:
    """Opens a text file without translating newlines, and shows how much of it has been read."""
    return rich.progress.open(
        str(path),
        "r",
        encoding="utf-8-sig",
        newline="",
        description=f"reading {path}",
        **_terminal(),
    )


def _terminal() -> dict[str, Any]:
    console = Console(stderr=True)
    return {"console": console, "transient": True, "disable": not console.is_terminal}
