"""Writes the results that rest on stored rows into docs/results: answers, tables, plots, CSV.

    python scripts/results.py

It trains and measures nothing. After another script has made new rows, this command brings all
pages up to date. A generated section stands between two comments of its page;
docs/results/README.md repeats the answers of all pages. The rows are in scripts/rows:

    reproduce_small, miniature,  one JSON file per run, written by the script of that name
    routers
    mixtures                     one JSON file per run of scripts/mixtures.py
    router_times.json            the times of scripts/routers.py
    machines.json                where and when these were made
    recipes.json                 accuracies of the configs with a dense counterpart
    compute.csv                  the tables of scripts/check_capacity.py
    pruning.csv                  the table of scripts/upcycle_and_prune.py
"""

import argparse
import csv
import json
import re
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import matplotlib
import miniature
import numpy as np
import routers
from classics import plots, show
from experiments import ROOT, ROWS, markdown_table, read_rows, write_sections
from matplotlib import pyplot
from reproduction.pages import sections
from reproduction.plots import COLORS, MARKS, plot
from reproduction.show import tables

PAGES = (
    *("sparse_or_dense", "design", "routers", "capacity", "specialization", "compute", "batch"),
    *("attacks", "upcycling", "pruning", "transfer", "mixtures"),
)
"""The pages of questions, in the order of docs/results/README.md."""
AS_TRAINED = {"Fashion-MNIST": 90.15, "emoji": 63.11}
Lines = list[dict[str, str]]


def write(rows: Path, pages: Path) -> None:
    """Writes all generated sections and CSV files."""
    models = read_rows(rows / "reproduce_small")
    recipes, machines = (
        json.loads((rows / f"{name}.json").read_text()) for name in ("recipes", "machines")
    )
    every = sections(models, recipes, machines["reproduce_small"])
    every["routers.md"] |= routers.sections(
        read_rows(rows / "routers"), routers.read_times(rows), machines["routers"]
    )
    every |= {
        "transfer.md": miniature.sections(read_rows(rows / "miniature"), machines["miniature"]),
        "mixtures.md": show.sections(read_rows(rows / "mixtures"), machines["mixtures"]),
        "compute.md": compute(read_csv(rows / "compute.csv")),
        "pruning.md": pruning(read_csv(rows / "pruning.csv")),
    }
    for page, own in every.items():
        write_sections(pages / page, own)
    for name, text in tables(models).items():
        (pages / name).write_text(text)
    write_sections(pages / "README.md", {"answers": answers(pages)})


def read_csv(path: Path) -> Lines:
    with path.open() as file:
        return list(csv.DictReader(file))


def compute(lines: Lines) -> dict[str, str]:
    """The tables of the capacity search, one for each data set."""
    columns = ["budget", "per-block", "uniform", "difference"]
    columns += ["per-block, validation", "uniform, validation"]
    columns += ["k, capacity factor, priority of blocks 1; 3; 5"]
    return {
        data: markdown_table(
            columns,
            (
                [
                    f"{line['budget']}x",
                    *(line["per-block"], line["uniform"]),
                    f"{float(line['difference']):+.2f} ± {line['error']}",
                    *(line["per-block validation"], line["uniform validation"]),
                    line["per-block setting"],
                ]
                for line in lines
                if line["data"] == data
            ),
        )
        for data in AS_TRAINED
    }


def pruning(lines: Lines) -> dict[str, str]:
    """The table of pruned models."""
    columns = ["experts", "parameters", "MFLOPs per image", "rule", "mean", "seeds 0, 1, 2", "cost"]
    full = np.mean(_seeds(lines[0]))
    cells = [
        [
            *(line["experts"], f"{int(line['parameters']):,}", line["mflops"], line["rule"]),
            f"{np.mean(_seeds(line)):.2f}",
            ", ".join(f"{value:.2f}" for value in _seeds(line)),
            f"{np.mean(_seeds(line)) - full:+.2f}" if line is not lines[0] else "",
        ]
        for line in lines
    ]
    return {"table": markdown_table(columns, cells)}


def _seeds(line: dict[str, str]) -> list[float]:
    return [float(line[f"seed {seed}"]) for seed in range(3)]


def plot_compute(lines: Lines) -> Any:
    figure, axes = pyplot.subplots(1, 2, figsize=(9, 3.8), layout="constrained")
    for ax, (data, trained) in zip(axes, AS_TRAINED.items(), strict=True):
        own = [line for line in lines if line["data"] == data]
        budgets = [float(line["budget"]) for line in own]
        for name, color, mark in zip(("per-block", "uniform"), COLORS, MARKS, strict=False):
            accuracies = [float(line[name]) for line in own]
            ax.plot(budgets, accuracies, marker=mark, color=color, label=name)
        ax.axhline(trained, color="gray", linestyle=":", label="as trained")
        ax.set(xlabel="FLOPs of the whole model, relative", ylabel="test accuracy in percent")
        ax.set_title(data, fontsize=10)
        ax.invert_xaxis()
        ax.legend(fontsize=8)
    return figure


def plot_pruning(lines: Lines) -> Any:
    figure, ax = pyplot.subplots(figsize=(6.5, 4), layout="constrained")
    rules = [rule for rule in dict.fromkeys(line["rule"] for line in lines) if rule != "none"]
    for rule, color, mark in zip(rules, COLORS, MARKS, strict=False):
        own = [line for line in lines if line["rule"] == rule]
        if rule != "average of 8":
            own.insert(0, lines[0])
        numbers = [int(line["experts"]) for line in own]
        every = np.array([_seeds(line) for line in own])
        ax.plot(numbers, every.mean(1), marker=mark, color=color, label=rule)
        ax.fill_between(numbers, every.min(1), every.max(1), color=color, alpha=0.15)
    ax.set(xscale="log", xlabel="experts that are kept", ylabel="test accuracy in percent")
    ax.set_xticks([8, 4, 2, 1], ["8", "4", "2", "1"])
    ax.minorticks_off()
    ax.invert_xaxis()
    ax.legend(fontsize=8)
    return figure


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


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rows", type=Path, default=ROWS, help="folder of all stored rows")
    parser.add_argument("--pages", type=Path, default=ROOT / "docs" / "results")
    options = parser.parse_args()
    write(options.rows, options.pages)
    matplotlib.use("Agg")
    plot(read_rows(options.rows / "reproduce_small"), options.pages)
    times = routers.read_times(options.rows)
    figure = routers.plot(read_rows(options.rows / "routers"), times)
    figure.savefig(options.pages / "routers.png", dpi=110)
    plots.plot(read_rows(options.rows / "mixtures")).savefig(
        options.pages / "mixtures.png", dpi=110
    )
    for name, draw in {"compute": plot_compute, "pruning": plot_pruning}.items():
        draw(read_csv(options.rows / f"{name}.csv")).savefig(options.pages / f"{name}.png", dpi=110)


if __name__ == "__main__":
    main()
