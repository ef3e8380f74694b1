"""Prints tables, messages and JSON."""

import dataclasses
import io
import json
import math
import os
import sys
from collections.abc import Iterable, Sequence
from typing import Any

from rich.console import Console
from rich.table import Table

from vmoe.errors import one_line

PIPE_WIDTH = 120  # characters per line of a table if stdout is not a terminal


def print_table(
    columns: Sequence[str], rows: Iterable[Sequence[str]], *, title: str = "", prose: bool = False
) -> None:
    """Prints a table whose first column holds names and all others numbers.

    Args:
        columns: headings; if all are empty, no header row is printed.
        prose: the other columns hold text instead, which is aligned at the left.
    """
    table = Table(show_header=any(columns))
    for i, column in enumerate(columns):
        side = "right" if i and not prose else "left"
        table.add_column(column, justify=side, overflow="fold")
    for row in rows:
        table.add_row(*map(one_line, row))
    if title:
        print(title)
    terminal = sys.stdout.isatty()
    width = None if terminal or "COLUMNS" in os.environ else PIPE_WIDTH
    text = io.StringIO()  # on stdout, rich would end the process where a pipe is closed
    Console(file=text, force_terminal=terminal, markup=False, width=width).print(table)
    print(text.getvalue(), end="")


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
