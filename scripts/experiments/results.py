"""Writes the results that rest on stored rows into docs/results: answers, tables, plots, CSV.

    python -m scripts.experiments results

It trains and measures nothing. After an experiment has made new rows, this command brings all pages
up to date. A generated section stands between two comments of its page; docs/results/README.md
repeats the answers of all pages. The rows are in scripts/experiments/rows:

    NAME.jsonl                   the runs of the experiment of that name, one a line
    router_times.json            the times of ``routers --times``
    machines.json                where and when these were made
    recipes.json                 accuracies of the configs with a dense counterpart
    compute.csv                  the tables of ``check_capacity``
    upcycling.csv, pruning.csv   the tables of ``upcycle_and_prune``
    batch.json                   what `vmoe mates --json` prints
"""

import argparse
import csv
import json
import re
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import matplotlib
from matplotlib import pyplot

from scripts.experiments import (
    batch,
    check_capacity,
    compiled,
    miniature,
    routers,
    upcycle_and_prune,
)
from scripts.experiments.claims import plots as claims_plots
from scripts.experiments.claims import sections as claims
from scripts.experiments.claims.design import shown
from scripts.experiments.claims.tables import models_csv
from scripts.experiments.framework.pages import markdown_table, write_sections
from scripts.experiments.framework.runs import ROOT, ROWS, Lines, Rows, read_rows
from scripts.experiments.mixtures import plots as mixtures_plots
from scripts.experiments.mixtures import tables as mixtures
from scripts.experiments.multitask import plots as multitask_plots
from scripts.experiments.multitask import tables as multitask
from scripts.experiments.solar import plots as solar_plots
from scripts.experiments.solar import tables as solar

PAGES = (
    *("sparse_or_dense", "design", "routers", "capacity", "specialization", "compute", "batch"),
    *("attacks", "upcycling", "pruning", "transfer", "real", "mixtures", "multitask"),
    "compiled",
)
"""The pages of questions, in the order of docs/results/README.md."""


class Stored:
    """What a folder of rows has."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def rows(self, name: str) -> Rows:
        return read_rows(self.folder / f"{name}.jsonl")

    def json(self, name: str) -> Any:
        return json.loads((self.folder / f"{name}.json").read_text())

    def lines(self, name: str) -> Lines:
        """The lines of a table that was written by hand."""
        with (self.folder / f"{name}.csv").open() as file:
            return list(csv.DictReader(file))


def write(stored: Stored, pages: Path) -> None:
    """Writes all generated sections and CSV files."""
    models, machines = shown(stored.rows("claims")), stored.json("machines")
    every = claims.sections(models, stored.json("recipes"), machines["claims"])
    every["batch.md"] |= batch.sections(stored.json("batch"))
    every["routers.md"] |= routers.sections(
        stored.rows("routers"), routers.read_times(stored.folder), machines["routers"]
    )
    every |= {
        "transfer.md": miniature.sections(stored.rows("miniature"), machines["miniature"]),
        "real.md": solar.sections(stored.rows("solar"), machines["solar"]),
        "mixtures.md": mixtures.sections(stored.rows("mixtures"), machines["mixtures"]),
        "multitask.md": multitask.sections(stored.rows("multitask"), machines["multitask"]),
        "compiled.md": compiled.sections(stored.rows("compiled"), machines["compiled"]),
        "compute.md": check_capacity.sections(stored.lines("compute")),
        "pruning.md": upcycle_and_prune.pruning_sections(stored.lines("pruning")),
        "upcycling.md": upcycle_and_prune.upcycling_sections(stored.lines("upcycling")),
    }
    for page, own in every.items():
        write_sections(pages / page, own)
    (pages / "models.csv").write_text(models_csv(models))
    write_sections(pages / "README.md", {"answers": answers(pages)})


def plots(stored: Stored) -> dict[str, Any]:
    """The figures by name."""
    return claims_plots.plots(shown(stored.rows("claims"))) | {
        "routers": routers.plot(stored.rows("routers"), routers.read_times(stored.folder)),
        "mixtures": mixtures_plots.plot(stored.rows("mixtures")),
        "multitask": multitask_plots.plot(stored.rows("multitask")),
        "transfer": miniature.plot(stored.rows("miniature")),
        "real": solar_plots.plot(stored.rows("solar")),
        "batch": batch.plot(stored.json("batch")),
        "compute": check_capacity.plot(stored.lines("compute")),
        "pruning": upcycle_and_prune.plot_pruning(stored.lines("pruning")),
        "upcycling": upcycle_and_prune.plot_upcycling(stored.lines("upcycling")),
    }


def answers(pages: Path) -> str:
    """The table of questions, answers and numbers, from the pages."""
    lines = []
    for name in PAGES:
        text = (pages / f"{name}.md").read_text()
        title = text.partition("\n")[0].removeprefix("# ")
        lines.append([f"[{title}]({name}.md)", *_fields(text, ("Answer", "Numbers"))])
    return markdown_table(["question", "answer at this scale", "numbers"], lines)


def _fields(text: str, names: Iterable[str]) -> list[str]:
    fields = []
    for name in names:
        found = re.search(rf"^\*\*{name}:\*\* (.*?)\n\n", text, re.DOTALL | re.MULTILINE)
        if not found:
            raise SystemExit(f"no **{name}:** on the page {text.partition(chr(10))[0]!r}")
        fields.append(" ".join(found[1].split()).removesuffix("."))
    return fields


def main(arguments: Sequence[str]) -> None:
    parser = argparse.ArgumentParser(
        "python -m scripts.experiments results", description=__doc__.splitlines()[0]
    )
    parser.add_argument("--rows", type=Path, default=ROWS, help="folder of all stored rows")
    parser.add_argument("--pages", type=Path, default=ROOT / "docs" / "results")
    options = parser.parse_args(arguments)
    stored = Stored(options.rows)
    write(stored, options.pages)
    matplotlib.use("Agg")
    for name, figure in plots(stored).items():
        figure.savefig(options.pages / f"{name}.png", dpi=110)
        pyplot.close(figure)
