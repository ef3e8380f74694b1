"""Upcycles, fine-tunes and prunes Fashion-MNIST models with three seeds.

    python scripts/upcycle_and_prune.py [--workdir runs/upcycle_and_prune] [--jobs 2]

Upcycling: the dense model gets 8 experts in every second block. Both are then trained for the same
further steps, each with the learning rate that is better on the validation split for seed 0.
Pruning: the sparse model keeps 4, 2 and 1 of 8 experts, chosen by each rule on the validation
split, and is not trained afterwards; "average" makes it dense. Accuracies are on the test split.
docs/results/upcycling.md and pruning.md have the results.

Every step is a command of vmoe. The script can be stopped at any time and started again: finished
steps are read from WORKDIR/results, and training resumes. It takes an hour and three quarters on 2
busy cores of an AMD EPYC (2026-11-26).
"""

import argparse
import itertools
import json
import shutil
from pathlib import Path
from typing import Any

from experiments import ROOT, SEEDS, Experiments, Result, percents
from rich.console import Console
from rich.table import Table

from vmoe import models
from vmoe.checkpoints import read, write

SPARSE, DENSE = (ROOT / "configs" / f"fashion_mnist{suffix}.py" for suffix in ("", "_dense"))
STEPS = 3_000  # after upcycling
RATES = (5e-4, 2e-3)
UPCYCLED = ("--model.moe.dropless", "--model.moe.router.normalize-weights")
RULES = ("load", "random", "router_norm")
KEPT = (4, 2, 1)


class Upcycling(Experiments):
    """Training, upcycling and pruning on one data set."""

    def evaluate(self, path: Path, split: str) -> float:
        """The accuracy in percent."""
        out = self.vmoe(
            "evaluate", "--checkpoint", path, "--data", f"fashion_mnist:{split}", "--json"
        )
        return 100 * json.loads(out)["accuracy"]

    def train(self, name: str, config: Path, seed: int, *options: Any) -> Result:
        """Trains a run; its accuracies by split."""
        workdir = self.workdir / f"{name}-{seed}"

        def run() -> Result:
            self.vmoe("train", "--config", config, "--workdir", workdir, "--seed", seed, *options)
            return {split: self.evaluate(workdir, split) for split in ("validation", "test")}

        return self.once(workdir.name, run)

    def upcycle(self, seed: int) -> Result:
        """The test accuracy of the dense model, and after upcycling."""
        dense, upcycled = (self.workdir / f"{name}-{seed}" for name in ("dense", "upcycled"))

        def run() -> Result:
            shutil.rmtree(upcycled, ignore_errors=True)  # what a stopped command left
            self.vmoe("upcycle", dense, upcycled, "--seed", seed)
            return {path.name: self.evaluate(path, "test") for path in (dense, upcycled)}

        return self.once(upcycled.name, run)

    def continue_training(self, parent: str, rate: float, seed: int) -> Result:
        """Accuracies of the dense or the upcycled model after more training."""
        config, moe = (DENSE, ()) if parent == "dense" else (SPARSE, UPCYCLED)
        source = self.workdir / f"{parent}-{seed}"
        options = ("--init", source, "--steps", STEPS, "--optim.lr", rate, *moe)
        return self.train(f"{parent}-continued-{rate:g}", config, seed, *options)

    def prune(self, rule: str, kept: int, seed: int) -> Result:
        """Accuracies, parameters and FLOPs before and after."""
        source = self.workdir / f"sparse-{seed}"
        pruned = self.workdir / f"pruned-{rule}-{kept}-{seed}"
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

        return self.once(pruned.name, run)

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


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--workdir", type=Path, default=Path("runs/upcycle_and_prune"))
    parser.add_argument("--jobs", type=int, default=2, help="commands at a time")
    options = parser.parse_args()
    workdir = options.workdir.absolute()
    experiments = Upcycling(workdir, workdir / "results", options.jobs)
    for name, config in {"dense": DENSE, "sparse": SPARSE}.items():
        experiments.all(experiments.train, [(name, config, seed) for seed in SEEDS])
    for table in (upcycling(experiments), pruning(experiments)):
        Console(width=100).print(table)


if __name__ == "__main__":
    main()
