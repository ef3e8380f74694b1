"""A progress bar in a terminal, for work on a whole data set."""

from collections.abc import Iterable, Iterator
from typing import TypeVar

from rich.console import Console
from rich.progress import track

T = TypeVar("T")


def progress(items: Iterable[T], text: str, total: int) -> Iterator[T]:
    """Yields the items, and shows on stderr how many are done; nothing if that is no terminal."""
    console = Console(stderr=True)
    yield from track(
        items, text, total, console=console, transient=True, disable=not console.is_terminal
    )
