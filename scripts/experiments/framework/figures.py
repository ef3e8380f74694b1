"""Experiments of several parts, each a function: a row has the figures that it returns.

A process of its own makes a row: ``python -m scripts.experiments NAME --row PART SEED``.
"""

import argparse
import json
import platform
import time
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from types import ModuleType
from typing import Any, NamedTuple

import numpy as np

from scripts.experiments.framework.pages import Tables
from scripts.experiments.framework.runs import (
    ROOT,
    ROWS,
    Comparison,
    Result,
    Rows,
    argument_parser,
)


class Part(NamedTuple):
    """What makes rows.

    Attributes:
        seeds: the number of rows.
        figures: gives the figures for the options and a seed.
        data: gives the checksums of the data that it reads, by name, for the options.
        later: whether it reads rows of the others, and so runs after them.
        settings: what else decides the figures, for JSON; stored in its rows.
    """

    seeds: int
    figures: Callable[[argparse.Namespace, int], Result]
    data: Callable[[argparse.Namespace], Result] = lambda options: {}
    later: bool = False
    settings: Mapping[str, Any] = {}


Parts = Mapping[str, Part]


def figures_parser(
    name: str, description: str, parts: Parts, **folders: str
) -> argparse.ArgumentParser:
    """A parser with the options of ``measured``.

    Args:
        name, description: as for ``argument_parser``.
        folders: for each option that names a folder, the default's name in ``data``.
    """
    parser = argument_parser(name, description, parts)
    parser.set_defaults(name=name, folders=tuple(folders))
    for option, folder in folders.items():
        parser.add_argument(f"--{option}", type=Path, default=ROOT / "data" / folder)
    parser.add_argument("--tiny", dest="size", action="store_const", const="tiny", default="full")
    parser.add_argument("--row", nargs=2, metavar=("PART", "SEED"), help="prints one row")
    return parser


def measured(
    options: argparse.Namespace, parts: Parts, libraries: Iterable[ModuleType], tables: Tables
) -> Rows:
    """Measures what is missing of ``--only``, prints the tables, and returns all rows of the file.

    With ``--row`` it prints that row instead, and returns none. Tiny rows are written to the folder
    of runs, since the committed ones are full.

    Args:
        libraries: their versions are in each row.
    """
    if options.row:
        print(json.dumps(_row(options, parts, libraries)))
        return {}
    if options.size == "tiny" and options.rows.is_relative_to(ROWS):
        options.rows = options.workdir / "tiny.jsonl"
    groups = (
        [name for name in options.only if parts[name].later == each] for each in (False, True)
    )
    rows = _Functions(options, parts).run(*groups)
    for title, table in tables.values():
        print(f"{title}\n\n{table(rows)}\n")
    return rows


def _row(options: argparse.Namespace, parts: Parts, libraries: Iterable[ModuleType]) -> Result:
    """The row that ``--row`` asks for: figures, the seconds of one core, and versions.

    Raises:
        SystemExit: there is no such part, or the seed is not a number.
    """
    name, seed = options.row
    if name not in parts or not seed.isdecimal():
        raise SystemExit(f"--row {name} {seed}: give a name of --only and a number from 0 on")
    start = time.process_time()
    figures = parts[name].figures(options, int(seed))
    return {
        "seconds": round(time.process_time() - start, 1),
        "versions": {
            "python": platform.python_version(),
            **{library.__name__: library.__version__ for library in (np, *libraries)},
        },
        "figures": figures,
    }


class _Functions(Comparison):
    needs = "figures"

    def __init__(self, options: argparse.Namespace, parts: Parts) -> None:
        super().__init__(options)
        self.parts = parts

    def settings(self, model: str) -> Result:
        part = self.parts[model]
        settings = {"settings": part.settings} if part.settings else {}
        return {"size": self.options.size, "data": part.data(self.options), **settings}

    def measure(self, model: str, seed: int) -> Result:
        command: list[Any] = [self.options.name, "--row", model, seed, "--rows", self.path]
        for name in self.options.folders:
            command += [f"--{name}", getattr(self.options, name).absolute()]
        if self.options.size == "tiny":
            command.append("--tiny")
        return json.loads(self.python("-m", "scripts.experiments", *command))

    def seeds(self, model: str) -> Iterable[int]:
        return range(self.parts[model].seeds)
