"""Experiments that are functions, and the pages that show their figures.

A row is a committed JSON file. A process of its own makes it: ``SCRIPT --row EXPERIMENT SEED``.
"""

import argparse
import json
import platform
import textwrap
import time
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from types import ModuleType
from typing import Any, NamedTuple

import numpy as np
from experiments import ROOT, Comparison, Result, Rows, argument_parser, markdown_table, read_rows

NOT_MEASURED = "Not measured yet."
COLUMNS = 100  # of a page


class Experiment(NamedTuple):
    """What makes a row.

    Attributes:
        seeds: the number of rows.
        figures: gives the figures for the options and a seed.
        data: gives the checksums of the data that it reads, by name, for the options.
        later: whether it reads rows of the others, and so runs after them.
    """

    seeds: int
    figures: Callable[[argparse.Namespace, int], Result]
    data: Callable[[argparse.Namespace], Result] = lambda options: {}
    later: bool = False


class Figures(Comparison):
    """The rows of experiments.

    Attributes:
        folders: options that name folders, which a command for one row gets, too.
    """

    needs = "figures"

    def __init__(
        self,
        options: argparse.Namespace,
        script: str,
        experiments: Mapping[str, Experiment],
        folders: Iterable[str],
    ):
        super().__init__(options)
        self.script, self.experiments, self.folders = script, experiments, tuple(folders)

    def settings(self, model: str) -> Result:
        return {"size": self.options.size, "data": self.experiments[model].data(self.options)}

    def measure(self, model: str, seed: int) -> Result:
        command: list[Any] = ["--row", model, seed, "--rows", self.results]
        for name in self.folders:
            command += [f"--{name}", getattr(self.options, name).absolute()]
        if self.options.size == "tiny":
            command.append("--tiny")
        return json.loads(self.python(self.script, *command))

    def run(self, models: Iterable[str]) -> Rows:
        """As for ``Comparison``; without ``--seeds``, each experiment has its own number."""
        seeds, models = self.options.seeds, list(models)
        for later in (False, True):
            self.all(
                self.row,
                [
                    (model, seed)
                    for model in models
                    if self.experiments[model].later == later
                    for seed in (range(self.experiments[model].seeds) if seeds is None else seeds)
                ],
            )
        return read_rows(self.results)


def figures_parser(
    description: str, name: str, experiments: Mapping[str, Experiment], **folders: str
) -> argparse.ArgumentParser:
    """A parser with the options of ``Figures``.

    Args:
        name: the name of the folders of runs and rows.
        folders: for each option that names a folder, the default's name in ``data``.
    """
    parser = argument_parser(description, name, experiments)
    parser.set_defaults(seeds=None)
    for option, folder in folders.items():
        parser.add_argument(f"--{option}", type=Path, default=ROOT / "data" / folder)
    parser.add_argument("--tiny", dest="size", action="store_const", const="tiny", default="full")
    parser.add_argument("--row", nargs=2, metavar=("EXPERIMENT", "SEED"), help="prints one row")
    return parser


def one_row(
    options: argparse.Namespace,
    experiments: Mapping[str, Experiment],
    libraries: Iterable[ModuleType],
) -> Result:
    """The row that ``--row`` asks for: figures, the seconds of one core, and versions.

    Raises:
        SystemExit: there is no such experiment, or the seed is not a number.
    """
    name, seed = options.row
    if name not in experiments or not seed.isdecimal():
        raise SystemExit(f"--row {name} {seed}: give a name of --only and a number from 0 on")
    start = time.process_time()
    figures = experiments[name].figures(options, int(seed))
    return {
        "seconds": round(time.process_time() - start, 1),
        "versions": {
            "python": platform.python_version(),
            **{library.__name__: library.__version__ for library in (np, *libraries)},
        },
        "figures": figures,
    }


def all_rows(
    options: argparse.Namespace,
    script: str,
    experiments: Mapping[str, Experiment],
    folders: Iterable[str],
) -> Rows:
    """Measures what is missing of ``--only``; returns all rows of the folder.

    Tiny rows are written to the folder of runs, since the committed ones are full.
    """
    committed = ROOT / "scripts" / "rows"
    if options.size == "tiny" and options.rows.is_relative_to(committed):
        options.rows = options.workdir / "tiny"
    return Figures(options, script, experiments, folders).run(options.only)


def figures_of(rows: Rows, name: str) -> list[Any]:
    """The figures of an experiment by seed; empty if it was not measured."""
    return [row["figures"] for _, row in sorted(rows.get(name, {}).items())]


def wrapped(text: str) -> str:
    """A paragraph of a page."""
    return textwrap.fill(" ".join(text.split()), COLUMNS, break_on_hyphens=False)


Part = tuple[str, str]
"""An answer and its numbers."""


def answer_of(parts: Iterable[Part | None]) -> str:
    """The answer of a page; None are the parts that were not measured."""
    parts = [part for part in parts if part] or [(NOT_MEASURED, NOT_MEASURED)]
    fields = []
    for word, texts in zip(("Answer", "Numbers"), zip(*parts, strict=True), strict=True):
        text = "; ".join(texts).rstrip(".")
        fields.append(wrapped(f"**{word}:** {text[0].upper()}{text[1:]}."))
    return "\n\n".join(fields)


Tables = Mapping[str, tuple[str, Callable[[Rows], str]]]
"""The tables of a page by the name of their section, with a title."""


def print_tables(tables: Tables, rows: Rows) -> None:
    """Prints all tables, each under its title."""
    for title, table in tables.values():
        print(f"{title}\n\n{table(rows)}\n")


def sections_of(
    tables: Tables, rows: Rows, answer: str, command: str, machine: str
) -> dict[str, str]:
    """The generated sections of a page by name.

    Args:
        command: makes the rows.
        machine: where and when they were made.
    """
    sections = {name: table(rows) for name, (_, table) in tables.items()}
    return sections | {"answer": answer, "how": how_measured(rows, command, machine)}


def how_measured(rows: Rows, command: str, machine: str) -> str:
    """The command, machine, hours and versions of all rows, and the checksums of their data."""
    every = [row for of in rows.values() for row in of.values()]
    if not every:
        return NOT_MEASURED
    versions = {f"{name} {value}" for row in every for name, value in row["versions"].items()}
    hours = sum(row["seconds"] for row in every) / 3600
    text = wrapped(
        f"""`{command}`, {machine}, {hours:.2g} hours of one core in all;
        {", ".join(sorted(versions))}."""
    )
    data = {name: value for row in every for name, value in row["data"].items()}
    lines = [[name, f"`{value}`"] for name, value in sorted(data.items())]
    return text + "\n\n" + markdown_table(["data", "SHA-256"], lines) if lines else text
