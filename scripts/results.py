"""Writes the results that rest on stored rows into docs/results: answers, tables, plots, CSV.

    python scripts/results.py

It trains and measures nothing. After another script has made new rows, this command brings all
pages up to date. A generated section stands between two comments of its page;
docs/results/README.md repeats the answers of all pages. The rows are in scripts/rows:

    reproduce_small, miniature,  one JSON file per run, written by the script of that name
    routers
    mixtures, multitask          one JSON file per run of these scripts, too
    router_times.json            the times of scripts/routers.py
    machines.json                where and when these were made
    recipes.json                 accuracies of the configs with a dense counterpart
    compute.csv                  the tables of scripts/check_capacity.py
    upcycling.csv, pruning.csv   the tables of scripts/upcycle_and_prune.py
    batch.json                   what `vmoe mates --json` prints
"""

import argparse
import csv
import json
import math
import re
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import classics.plots
import classics.show
import matplotlib
import miniature
import numpy as np
import routers
import tasks.plots
import tasks.show
from differences import Difference, corrected, difference, tested
from experiments import ROOT, ROWS, markdown_table, read_rows, write_sections
from figures import wrapped
from matplotlib import pyplot
from reproduction.pages import sections
from reproduction.plots import COLORS, MARKS, plot
from reproduction.show import tables

PAGES = (
    *("sparse_or_dense", "design", "routers", "capacity", "specialization", "compute", "batch"),
    *("attacks", "upcycling", "pruning", "transfer", "mixtures", "multitask"),
)
"""The pages of questions, in the order of docs/results/README.md."""
SEARCHED = {
    "Fashion-MNIST": "the Fashion-MNIST model",
    "vmoe_emoji": "the packaged emoji model",
    "emoji": "the mean of three emoji models",
}
"""The models of the capacity search by the name of their table, in words."""
SAVED = "0.8"
"""The budget of the answer."""
AT_MOST = 1.645
"""Standard errors below a difference that bound a loss, in 95% of the cases."""
MATES = {
    "none": "alone",
    "mean of the draws": "mean of 256 draws",
    "worst of the draws": "worst of 256 draws",
    "first draw": "first draw",
    "optimized": "optimized",
    "random signs": "random signs",
}
"""The other images of a group, by their name in a row."""
VICTIMS = 128  # of the command that made batch.json
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
        "mixtures.md": classics.show.sections(read_rows(rows / "mixtures"), machines["mixtures"]),
        "multitask.md": tasks.show.sections(read_rows(rows / "multitask"), machines["multitask"]),
        "compute.md": compute(read_csv(rows / "compute.csv")),
        "pruning.md": pruning(read_csv(rows / "pruning.csv")),
        "upcycling.md": upcycling(read_csv(rows / "upcycling.csv")),
    }
    every["batch.md"] |= batch(json.loads((rows / "batch.json").read_text()))
    for page, own in every.items():
        write_sections(pages / page, own)
    for name, text in tables(models).items():
        (pages / name).write_text(text)
    write_sections(pages / "README.md", {"answers": answers(pages)})


def read_csv(path: Path) -> Lines:
    with path.open() as file:
        return list(csv.DictReader(file))


def compute(lines: Lines) -> dict[str, str]:
    """The answer and the tables of the capacity search, one for each key of ``SEARCHED``."""
    of = {
        data: {line["budget"]: line for line in lines if line["data"] == data} for data in SEARCHED
    }
    own = {data: {each: differences(line) for each, line in of[data].items()} for data in of}
    from_uniform, from_trained = (
        {
            data: corrected({budget: pair[i] for budget, pair in every.items() if pair[i]})
            for data, every in own.items()
        }
        for i in (0, 1)
    )
    losses = [
        f"{text} {_loss(from_trained[data][SAVED])}"
        for data, text in SEARCHED.items()
        if from_trained[data]
    ]
    better = [
        f"{sum(x.clear and x.mean > 0 for x in found.values())} of {len(found)} budgets with "
        f"{SEARCHED[data]}"
        for data, found in from_uniform.items()
    ]
    answer = f"""**Answer:** With {1 - float(SAVED):.0%} fewer FLOPs, {"; ".join(losses)}. A setting
        for each block is better than a uniform one at few budgets."""
    numbers = [
        f"{text} {x.mean:+.2f} ± {x.error:.2f}"
        if (x := from_trained[data].get(SAVED))
        else f"{text} {of[data][SAVED]['from trained']}, without an error"
        for data, text in SEARCHED.items()
    ]
    numbers = f"""**Numbers:** points at {SAVED}x minus as trained: {", ".join(numbers)}; per-block
        is clearly better than uniform at {", ".join(better)}."""
    tables = {data: _searched(of[data], from_uniform[data], from_trained[data]) for data in of}
    return {"answer": f"{wrapped(answer)}\n\n{wrapped(numbers)}"} | tables


def differences(line: Mapping[str, str]) -> tuple[Difference, Difference | None]:
    """Per-block minus uniform, and minus as trained, in points; None without an error.

    The errors are over the images. Of three emoji models they were computed as if the two drawings
    of an emoji were independent; if they were equal, errors would be larger by sqrt(2).
    """
    wider = math.sqrt(2) if line["data"] == "emoji" else 1.0
    found = [
        tested(float(line[name]), [((wider * float(line[error])) ** 2, math.inf)])
        if line[error]
        else None
        for name, error in {"difference": "error", "from trained": "its error"}.items()
    ]
    assert found[0]
    return found[0], found[1]


def _loss(found: Difference) -> str:
    """How much accuracy is lost, in words."""
    if found.clear:
        return f"{'loses' if found.mean < 0 else 'gains'} {abs(found.mean):.1f} points"
    most = math.ceil(100 * (AT_MOST * found.error - found.mean)) / 100
    return f"is **not measurably less** accurate (it loses at most {most:.2f} points, at 95%)"


def _searched(
    lines: Mapping[str, Mapping[str, str]],
    from_uniform: Mapping[str, Difference],
    from_trained: Mapping[str, Difference],
) -> str:
    """The table of a model: differences are bold where a test is clear."""

    def shown(found: Difference, at_most: bool = False) -> str:
        text = f"{found.mean:+.2f} ± {'at most ' * at_most}{found.error:.2f}"
        return f"**{text}**" if found.clear else text

    columns = ["budget", "per-block", "uniform", "per-block − uniform", "per-block − as trained"]
    columns += ["per-block, validation", "uniform, validation"]
    columns += ["k, capacity factor, priority of blocks 1; 3; 5"]
    return markdown_table(
        columns,
        (
            [
                f"{budget}x",
                *(line["per-block"], line["uniform"]),
                shown(from_uniform[budget], line["data"] == "emoji"),
                shown(from_trained[budget])
                if budget in from_trained
                else f"{float(line['from trained']):+.2f}",
                *(line["per-block validation"], line["uniform validation"]),
                line["per-block setting"],
            ]
            for budget, line in lines.items()
        ),
    )


def pruning(lines: Lines) -> dict[str, str]:
    """The table of pruned models."""
    columns = ["experts", "parameters", "MFLOPs per image", "rule", "mean", "seeds 0, 1, 2", "cost"]
    full = np.mean(_seeds(lines[0]))
    cells = [
        [
            *(line["experts"], f"{int(line['parameters']):,}", line["mflops"], line["rule"]),
            *_mean_and_seeds(line),
            f"{np.mean(_seeds(line)) - full:+.2f}" if line is not lines[0] else "",
        ]
        for line in lines
    ]
    return {"table": markdown_table(columns, cells)}


def upcycling(lines: Lines) -> dict[str, str]:
    """The table of dense and upcycled models."""
    cells = []
    for line in lines:
        steps = int(line["further steps"])
        label = f"{line['model']}, {steps:,} more steps" if steps else line["model"]
        cells.append([label, *_mean_and_seeds(line)])
    after = {
        line["model"]: np.array(_seeds(line)) for line in lines if line["further steps"] != "0"
    }
    found = difference(after["upcycled"], after["dense"])
    cells.append(
        [
            "upcycled − dense, both with more steps",
            f"{found.mean:+.2f} ± {found.error:.2f}",
            ", ".join(f"{x:+.2f}" for x in after["upcycled"] - after["dense"]),
        ]
    )
    return {"table": markdown_table(["model", "mean", "seeds 0, 1, 2"], cells)}


def batch(rows: Sequence[Mapping[str, Any]]) -> dict[str, str]:
    """The table of victims with other images in their group."""
    lines = []
    for setting, own in _by_setting(rows).items():
        alone, *others = (own[name] for name in MATES)
        pairs = (f"{_of_victims(row['accuracy'])} ({100 * row['changed']:.1f})" for row in others)
        lines.append([setting, _of_victims(alone["accuracy"]), *pairs])
    return {"table": markdown_table(["capacity factor, priority", *MATES.values()], lines)}


def _of_victims(accuracy: float) -> str:
    """An accuracy with its standard error; of a mean over draws the error is at most that."""
    return f"{100 * accuracy:.1f} ± {100 * math.sqrt(accuracy * (1 - accuracy) / VICTIMS):.1f}"


def _by_setting(rows: Sequence[Mapping[str, Any]]) -> dict[str, dict[str, Mapping[str, Any]]]:
    """The rows by setting, in words, and then by name of ``MATES``."""
    settings: dict[str, dict[str, Mapping[str, Any]]] = {}
    for row in rows:
        factor = row["capacity_factor"]
        words = [
            "dropless" if factor is None else f"{factor:g}",
            row["priority"].replace("_", " "),
            *(["one image per group"] if row["split"] else []),
        ]
        settings.setdefault(", ".join(words), {})[row["mates"]] = row
    return settings


def _seeds(line: dict[str, str]) -> list[float]:
    return [float(line[f"seed {seed}"]) for seed in range(3)]


def _mean_and_seeds(line: dict[str, str]) -> tuple[str, str]:
    return f"{np.mean(_seeds(line)):.2f}", ", ".join(f"{value:.2f}" for value in _seeds(line))


def plot_compute(lines: Lines) -> Any:
    figure, axes = pyplot.subplots(1, 3, figsize=(13, 3.8), layout="constrained")
    for ax, (data, title) in zip(axes, SEARCHED.items(), strict=True):
        own = [line for line in lines if line["data"] == data]
        budgets = [float(line["budget"]) for line in own]
        for name, color, mark in zip(("per-block", "uniform"), COLORS, MARKS, strict=False):
            accuracies = [float(line[name]) for line in own]
            ax.plot(budgets, accuracies, marker=mark, color=color, label=name)
        ax.axhline(float(own[0]["as trained"]), color="gray", linestyle=":", label="as trained")
        ax.set(xlabel="FLOPs of the whole model, relative", ylabel="test accuracy in percent")
        ax.set_title(title, fontsize=10)
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


def plot_upcycling(lines: Lines) -> Any:
    figure, ax = pyplot.subplots(figsize=(6.5, 4), layout="constrained")
    for name, color, mark in zip(("upcycled", "dense"), COLORS[::4], MARKS, strict=False):
        own = [line for line in lines if line["model"] == name]
        xs = [int(line["further steps"]) for line in own]
        every = np.array([_seeds(line) for line in own])
        ax.plot(xs, every, color=color, alpha=0.35, marker=mark, markersize=4)
        ax.plot(xs, every.mean(1), color=color, marker=mark, linewidth=2, label=f"{name}, mean")
    ax.set(xlabel="further training steps", ylabel="test accuracy in percent")
    ax.set_xticks(xs, [f"{x:,}" for x in xs])
    ax.set_title("faint lines are seeds; without further steps both are equal", fontsize=10)
    ax.legend(fontsize=8)
    return figure


def plot_batch(rows: Sequence[Mapping[str, Any]]) -> Any:
    settings = _by_setting(rows)
    ys = range(len(settings))[::-1]
    figure, axes = pyplot.subplots(1, 2, figsize=(10, 4.8), layout="constrained", sharey=True)
    for ax, measure in zip(axes, ("accuracy", "changed"), strict=True):
        for (name, label), color, mark in zip(
            MATES.items(), ("black", *COLORS), "|osD^v", strict=True
        ):
            xs = [100 * own[name][measure] for own in settings.values()]
            size = 16 if mark == "|" else 6
            ax.plot(xs, ys, mark, color=color, label=label, alpha=0.8, markersize=size)
        ax.grid(axis="y", alpha=0.3)
    axes[0].set_yticks(ys, settings, fontsize=9)
    axes[0].set(xlabel="test accuracy in percent")
    axes[1].set(xlabel="predictions that change, percent")
    title = "the other images of the group"
    figure.legend(
        *axes[0].get_legend_handles_labels(), loc="outside lower center", ncols=6, title=title
    )
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
    figures = {"routers": routers.plot(read_rows(options.rows / "routers"), times)}
    figures["mixtures"] = classics.plots.plot(read_rows(options.rows / "mixtures"))
    figures["multitask"] = tasks.plots.plot(read_rows(options.rows / "multitask"))
    figures["transfer"] = miniature.plot(read_rows(options.rows / "miniature"))
    figures["batch"] = plot_batch(json.loads((options.rows / "batch.json").read_text()))
    of_csv = {"compute": plot_compute, "pruning": plot_pruning, "upcycling": plot_upcycling}
    figures |= {name: draw(read_csv(options.rows / f"{name}.csv")) for name, draw in of_csv.items()}
    for name, figure in figures.items():
        figure.savefig(options.pages / f"{name}.png", dpi=110)


if __name__ == "__main__":
    main()
