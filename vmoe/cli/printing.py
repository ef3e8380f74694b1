"""Prints tables, messages and JSON."""

import dataclasses
import io
import json
import math
import os
import re
import sys
import textwrap
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

from rich.cells import cell_len
from rich.console import Console
from rich.table import Table

from vmoe.errors import one_line

PIPE_WIDTH = 120  # characters per line of a table if stdout is not a terminal
UNBROKEN = re.compile(r"(?<=[\d%±]) |(?<= x) ")
"""Spaces at which no line ends, as in "1,234 MB", "90.15% ± 0.30" and "8 x 128"."""
LONGEST = 44  # characters of a word that is not broken; paths may be longer


def print_table(
    columns: Sequence[str], rows: Iterable[Sequence[str]], *, title: str = "", prose: bool = False
) -> None:
    """Prints a table whose first column holds names and all others numbers.

    If it is wider than the terminal, lines end between words, but not between a number and its
    unit, nor inside words, except long ones such as paths. If it still is, its last columns follow
    in another table, which repeats the first one.

    Args:
        columns: headings; if all are empty, no header row is printed.
        prose: the other columns hold text instead, which is aligned at the left.
    """
    if title:
        print(title)
    terminal = sys.stdout.isatty()
    width = None if terminal or "COLUMNS" in os.environ else PIPE_WIDTH
    text = io.StringIO()  # on stdout, rich would end the process where a pipe is closed
    console = Console(file=text, force_terminal=terminal, markup=False, width=width)
    cells = zip(columns, *(map(one_line, row) for row in rows), strict=True)
    names, *others = ([UNBROKEN.sub("\xa0", cell) for cell in column] for column in cells)
    room, console.width = console.width, sys.maxsize  # a long name is not cut off
    while others:
        count = len(others)
        while count > 1 and _total(map(_narrowest, [names, *others[:count]])) > room:
            count -= 1
        table = Table(show_header=any(columns))
        headings, *lines = zip(*_wrapped([names, *others[:count]], room), strict=True)
        for i, heading in enumerate(headings):
            side = "right" if i and not prose else "left"
            table.add_column(heading, justify=side, no_wrap=True)
        for line in lines:
            table.add_row(*line)
        console.print(table)
        others = others[count:]
    print(text.getvalue().replace("\xa0", " "), end="")


def _total(widths: Iterable[int]) -> int:
    """The width of a table; each column has a border and a space at both sides."""
    return 1 + sum(width + 3 for width in widths)


def _narrowest(column: Iterable[str]) -> int:
    return min(LONGEST, max(cell_len(word) for cell in column for word in cell.split(" ")))


def _wrapped(columns: Sequence[Sequence[str]], room: int) -> Iterator[list[str]]:
    """The columns with line breaks; the widest one is narrowed until all fit, as far as it can."""
    widths = [max(map(cell_len, column)) for column in columns]
    least = list(map(_narrowest, columns))
    while _total(widths) > room and widths != least:
        wide = [width * (width > each) for width, each in zip(widths, least, strict=True)]
        widths[wide.index(max(wide))] -= 1
    for column, width in zip(columns, widths, strict=True):
        lines = (textwrap.wrap(cell, width, break_on_hyphens=False) for cell in column)
        yield list(map("\n".join, lines))


def four_digits(value: float) -> str:
    """A number with four significant digits, trailing zeros included.

    >>> four_digits(0.0141), four_digits(0.01409), four_digits(1234.0)
    ('0.01410', '0.01409', '1234')
    """
    return f"{value:#.4g}".removesuffix(".")


def print_messages(lines: Iterable[str]) -> None:
    """Prints notes about the results on stderr."""
    for line in lines:
        print(one_line(line), file=sys.stderr)


def print_json(value: Any) -> None:
    """Prints a value as one line of JSON.

    A dataclass or a named tuple is an object of its fields; a number that is not finite is null.
    """
    print(json.dumps(_plain(value), allow_nan=False))


def _plain(value: Any) -> Any:
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        value = dataclasses.asdict(value)
    if isinstance(value, tuple) and hasattr(value, "_asdict"):
        value = value._asdict()
    if isinstance(value, dict):
        return {name: _plain(each) for name, each in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(each) for each in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
