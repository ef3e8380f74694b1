"""Upcycles, fine-tunes and prunes Fashion-MNIST models with three seeds.

    python -m scripts.experiments upcycle_and_prune [--jobs 2]

Upcycling: the dense model gets 8 experts in every second block. Both are then trained for the same
further steps, each with the learning rate that is better on the validation split for seed 0.
Pruning: the sparse model keeps 4, 2 and 1 of 8 experts, chosen by each rule on the validation
split, and is not trained afterwards; "average" makes it dense. Accuracies are on the test split.
docs/results/upcycling.md and pruning.md have the results.

Every step is a command of vmoe. It can be stopped at any time and started again: finished steps are
read from WORKDIR/steps.jsonl, and training resumes. It takes an hour and three quarters on 2
busy cores of an AMD EPYC (2026-11-26).
"""

import itertools
import json
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib import pyplot
from rich.console import Console
from rich.table import Table

from scripts.experiments.framework.differences import difference, signed
from scripts.experiments.framework.pages import markdown_table, percents
from scripts.experiments.framework.plots import COLORS, MARKS
from scripts.experiments.framework.runs import (
    ROOT,
    SEEDS,
    Experiment,
    Lines,
    Result,
    argument_parser,
)
from vmoe import models
from vmoe.checkpoints import read, write

SPARSE, DENSE = (ROOT / "configs" / f"fashion_mnist{suffix}.py" for suffix in ("", "_dense"))
STEPS = 3_000  # after upcycling
RATES = (5e-4, 2e-3)
UPCYCLED = ("--model.moe.router.dropless", "--model.moe.router.normalize-weights")
RULES = ("load", "random", "router_norm")
KEPT = (4, 2, 1)


class Upcycling(Experiment):
    """Training, upcycling and pruning on one data set."""

    def evaluate(self, path: Path, split: str) -> float:
        """The accuracy in percent."""
        return 100 * self.evaluated(path, f"fashion_mnist:{split}")["accuracy"]

    def train(self, name: str, config: Path, seed: int, *options: Any) -> Result:
        """Trains a run; its accuracies by split."""
        workdir = self.workdir / f"{name}-{seed}"

        def run() -> Result:
            self.vmoe("train", "--config", config, "--workdir", workdir, "--seed", seed, *options)
            return {split: self.evaluate(workdir, split) for split in ("validation", "test")}

        return self.once(name, seed, run)

    def upcycle(self, seed: int) -> Result:
        """The test accuracy of the dense model, and after upcycling."""
        dense, upcycled = (self.workdir / f"{name}-{seed}" for name in ("dense", "upcycled"))

        def run() -> Result:
            shutil.rmtree(upcycled, ignore_errors=True)  # what a stopped command left
            self.vmoe("upcycle", dense, upcycled, "--seed", seed)
            return {path.name: self.evaluate(path, "test") for path in (dense, upcycled)}

        return self.once("upcycled", seed, run)

    def continue_training(self, parent: str, rate: float, seed: int) -> Result:
        """Accuracies of the dense or the upcycled model after more training."""
        config, moe = (DENSE, ()) if parent == "dense" else (SPARSE, UPCYCLED)
        source = self.workdir / f"{parent}-{seed}"
        options = ("--init", source, "--steps", STEPS, "--optim.lr", rate, *moe)
        return self.train(f"{parent}-continued-{rate:g}", config, seed, *options)

    def prune(self, rule: str, kept: int, seed: int) -> Result:
        """Accuracies, parameters and FLOPs before and after."""
        source = self.workdir / f"sparse-{seed}"
        name = f"pruned-{rule}-{kept}"
        pruned = self.workdir / f"{name}-{seed}"
        options = ["--rule", rule, "--num-experts", kept]
        if rule == "random":
            options += ["--seed", seed]
        if rule == "router_norm":
            options += ["--before", self.untrained(seed)]
        if kept == 1:
            options += ["--k", 1]

        def run() -> Result:
            shutil.rmtree(pruned, ignore_errors=True)
            result = json.loads(self.vmoe("prune", source, pruned, *options, "--json"))
            return result | {"test": self.evaluate(pruned, "test")}

        return self.once(name, seed, run)

    def untrained(self, seed: int) -> Path:
        """The sparse model as it was before training, for the change of its routers."""
        path = self.workdir / f"untrained-{seed}"
        if not (path / "config.json").exists():
            shutil.rmtree(path, ignore_errors=True)
            stored = read(self.workdir / f"sparse-{seed}")
            initial = models.params_of(models.build(stored.config, seed=seed))
            write(stored._replace(params=initial, step=0), path, format="vmoe")
        return path


def upcycling(experiments: Upcycling) -> Table:
    """Trains what is missing; the table of dense and upcycled models."""
    parents = experiments.all(experiments.upcycle, [(seed,) for seed in SEEDS])
    names = ("dense", "upcycled")
    choices = list(itertools.product(names, RATES))
    first = experiments.all(experiments.continue_training, [(*choice, 0) for choice in choices])
    scores = {choice: result["validation"] for choice, result in zip(choices, first, strict=True)}
    best = {name: max(RATES, key=lambda rate, name=name: scores[name, rate]) for name in names}
    table = Table("model", "test accuracy, seeds 0, 1, 2", "mean", title="upcycling")
    experiments.all(
        experiments.continue_training,
        [(name, best[name], seed) for name in names for seed in SEEDS],
    )
    for name in names:
        tests = [parents[seed][f"{name}-{seed}"] for seed in SEEDS]
        table.add_row("dense" if name == "dense" else "upcycled to 8 experts", *percents(tests))
        after = [experiments.continue_training(name, best[name], seed)["test"] for seed in SEEDS]
        label = f"{name}, {STEPS:,} more steps at a learning rate of {best[name]:g}"
        table.add_row(label, *percents(after))
    for (name, rate), score in scores.items():
        print(f"validation, seed 0: {name}, learning rate {rate:g}: {score:.2f}")
    return table


def pruning(experiments: Upcycling) -> Table:
    """Prunes what is missing; the table of accuracy against FLOPs."""
    for seed in SEEDS:
        experiments.untrained(seed)
    variants = [*itertools.product(RULES, KEPT), ("average", 0)]
    results = experiments.all(
        experiments.prune, [(*variant, seed) for variant in variants for seed in SEEDS]
    )
    columns = ("rule", "experts", "parameters", "MFLOPs per image", "test accuracy", "mean")
    table = Table(*columns, title="pruning")
    before = [experiments.train("sparse", SPARSE, seed)["test"] for seed in SEEDS]
    table.add_row("-", "8", *costs(results[0]["before"]), *percents(before))
    for i, (rule, kept) in enumerate(variants):
        seeds = results[len(SEEDS) * i : len(SEEDS) * (i + 1)]
        tests = [result["test"] for result in seeds]
        experts = str(kept) if kept else "dense"
        table.add_row(rule, experts, *costs(seeds[0]["after"]), *percents(tests))
    return table


def costs(row: Result) -> tuple[str, str]:
    return f"{row['parameters']:,}", f"{1e3 * row['gflops_per_image']:.2f}"


def pruning_sections(lines: Lines) -> dict[str, str]:
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


def upcycling_sections(lines: Lines) -> dict[str, str]:
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
            signed(found),
            ", ".join(f"{x:+.2f}" for x in after["upcycled"] - after["dense"]),
        ]
    )
    return {"table": markdown_table(["model", "mean", "seeds 0, 1, 2"], cells)}


def _seeds(line: Mapping[str, str]) -> list[float]:
    return [float(line[f"seed {seed}"]) for seed in range(3)]


def _mean_and_seeds(line: Mapping[str, str]) -> tuple[str, ...]:
    return percents(_seeds(line))[::-1]


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


def main(arguments: Sequence[str]) -> None:
    parser = argument_parser("upcycle_and_prune", __doc__)
    parser.set_defaults(rows=None)
    options = parser.parse_args(arguments)
    options.rows = options.rows or options.workdir / "steps.jsonl"
    experiments = Upcycling(options)
    for name, config in {"dense": DENSE, "sparse": SPARSE}.items():
        experiments.all(experiments.train, [(name, config, seed) for seed in SEEDS])
    for table in (upcycling(experiments), pruning(experiments)):
        Console(width=100).print(table)
