"""Pre-training, few-shot probes and fine-tuning in miniature: emoji, V-MoE and dense counterpart.

    python -m scripts.prepare.emoji data/emoji
    python -m scripts.experiments miniature      # trains and measures what is missing; prints
    python -m scripts.experiments results        # then writes docs/results/transfer.md

For each model and seed it pre-trains on the words of Google's drawings (configs/emoji_pretrain.py),
fits linear probes of the features on the categories of each vendor's drawings, fine-tunes on the
categories of Google's drawings (configs/emoji_finetune.py), and evaluates on the held-out emoji of
both vendors. No training, probe or choice has seen an emoji of the test split, from either vendor.
The configs say which settings were tried.

The figures of a model and seed are a line of scripts/experiments/rows/miniature.jsonl. A run with
such a line is neither trained nor measured again. A line of an earlier version, which does not say
in which order images were evaluated, is replaced. The command can be stopped at any time and
started again: training resumes.
"""

import argparse
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib import pyplot

from scripts.experiments.framework import pages
from scripts.experiments.framework.differences import corrected, difference, signed
from scripts.experiments.framework.pages import jax_versions, markdown_table
from scripts.experiments.framework.plots import COLORS, dots
from scripts.experiments.framework.runs import (
    ROOT,
    Comparison,
    Result,
    Rows,
    argument_parser,
    in_steps,
    versions,
)
from vmoe.config import TrainConfig, load, replace
from vmoe.costs.flops import cost
from vmoe.data.pipeline import ORDER

MODELS = {"sparse": "V-MoE", "dense": "dense"}
PARTS = ("pretrain", "finetune")
SHOTS = (1, 5, 10, 25)
VENDORS = {"google": "the training style", "twitter": "an unseen style"}


def train_config(part: str, model: str, data: Path, steps: int | None) -> TrainConfig:
    """The config of a training.

    Args:
        part: one of ``PARTS``.
        data: the folder of the data set.
        steps: replaces the number of steps of the config.
    """
    suffix = "" if model == "sparse" else f"_{model}"
    recipe = load(ROOT / "configs" / f"emoji_{part}{suffix}.py")
    name = f"manifest:{data / Path(recipe.data.name).name}"
    return in_steps(replace(recipe, data={"name": name}), steps)


class Miniature(Comparison):
    """The runs of both models."""

    needs = "order"

    def __init__(self, options: argparse.Namespace) -> None:
        super().__init__(options)
        self.data = options.data.absolute()

    def configs(self, model: str) -> list[TrainConfig]:
        """The configs of pre-training and fine-tuning."""
        return [train_config(part, model, self.data, self.options.steps) for part in PARTS]

    def settings(self, model: str) -> Result:
        return {"steps": [config.steps for config in self.configs(model)], "order": ORDER}

    def measure(self, model: str, seed: int) -> Result:
        configs = self.configs(model)
        for config in configs:
            if not (file := Path(config.data.name.removeprefix("manifest:"))).is_file():
                raise SystemExit(
                    f"{file}: no such file; make it with python -m scripts.prepare.emoji"
                )
        pretrained, finetuned = (self.workdir / f"{part}-{model}-{seed}" for part in PARTS)
        start = None if pretrained.exists() else time.perf_counter()
        self.train(configs[0], pretrained, seed)
        self.train(configs[1], finetuned, seed, "--init", pretrained)
        figures = dict(self.figures(pretrained, finetuned, seed))
        seconds = None if start is None else round(time.perf_counter() - start)
        costs = [cost(config.model) for config in configs]
        return {
            "parameters": [each.parameters for each in costs],
            "flops_per_image": [each.flops_per_image for each in costs],
            "seconds": seconds,  # unless it was stopped and resumed
            "versions": versions(finetuned),
            "figures": figures,
        }

    def figures(self, pretrained: Path, finetuned: Path, seed: int) -> Iterator[tuple[str, float]]:
        """Accuracies on the test splits, by name."""
        yield "words", self.accuracy(pretrained, "google_words.csv:test")
        yield from self.probes(pretrained, seed)
        for vendor in VENDORS:
            yield f"finetuned.{vendor}", self.accuracy(finetuned, f"{vendor}.csv:test")

    def accuracy(self, run: Path, split: str) -> float:
        """The accuracy on a split of a list; each of several labels counts as right."""
        return self.evaluated(run, f"manifest:{self.data / split}")["accuracy"]

    def probes(self, run: Path, seed: int) -> Iterator[tuple[str, float]]:
        """Accuracies of probes on the test splits, from shots of the training splits."""
        data = {vendor: f"manifest:{self.data / vendor}.csv" for vendor in VENDORS}
        accuracies = self.probed(run, *data.values(), shots=SHOTS, seed=seed)
        for vendor, name in data.items():
            for number, value in zip(SHOTS, accuracies[name], strict=True):
                yield f"probe.{number}.{vendor}", value


def labels() -> dict[str, str]:
    """The figures of a row, with a description."""
    every = {"words": "pre-training, top-1 word"}
    for vendor, text in VENDORS.items():
        for number in SHOTS:
            every[f"probe.{number}.{vendor}"] = f"probe, shots per category: {number}; {text}"
    for vendor, text in VENDORS.items():
        every[f"finetuned.{vendor}"] = f"fine-tuned; {text}"
    return every


def sections(rows: Rows, machine: str) -> dict[str, str]:
    """The generated sections of docs/results/transfer.md by name.

    Args:
        machine: where and when the rows were made.
    """
    how = f"`python -m scripts.experiments miniature`, {machine}, {jax_versions(rows)}."
    return {"answer": answer(rows), "table": table(rows), "how": how}


def _compared(rows: Rows) -> dict[str, list[np.ndarray]]:
    """The accuracies of the measured models in percent, by figure."""
    return {
        name: [
            100 * np.array([each[name] for each in pages.figures_of(rows, model)])
            for model in MODELS
            if model in rows
        ]
        for name in labels()
    }


def answer(rows: Rows) -> str:
    """The answer and its numbers, which the page of answers repeats."""
    every = _compared(rows)
    tests = {name: difference(*pair, paired=False) for name, pair in every.items()}
    clear = [each.mean for each in corrected(tests).values() if each.clear]
    better, worse = sum(mean > 0 for mean in clear), sum(mean < 0 for mean in clear)
    word = "Cannot tell" if not clear else "**Sometimes**" if better else "**No**"
    differences = [each.mean for each in tests.values()]
    text = f"""{word}: V-MoE is clearly better in {better} and clearly worse in {worse} of
        {len(every)} comparisons"""
    numbers = f"""V-MoE − dense: {min(differences):+.1f} to {max(differences):+.1f} points; one
        accuracy has a standard error of 3 to 4 points"""
    return pages.answer([text], [numbers])


def table(rows: Rows) -> str:
    """All accuracies, and the cost of the models."""
    measured = {model: rows[model] for model in MODELS if model in rows}
    columns = ["accuracy in percent, held-out emoji"]
    columns += [f"{name}: {MODELS[model]}" for name, model in zip("AB", measured, strict=False)]
    lines = []
    for name, every in _compared(rows).items():
        cells = [labels()[name]]
        for own in every:
            cells.append(f"{own.mean():.2f} ({', '.join(f'{value:.2f}' for value in own)})")
        if len(every) == len(MODELS):
            cells.append(signed(difference(*every, paired=False)))
        lines.append(cells)
    if len(measured) == len(MODELS):
        columns.append("A − B")
    return f"{markdown_table(columns, lines)}\n\n{_costs(measured)}".rstrip()


def plot(rows: Rows) -> Any:
    """The accuracies of both models."""
    every = _compared(rows)
    figure, ax = pyplot.subplots(figsize=(8, 4.8), layout="constrained")
    for y, pair in enumerate(list(every.values())[::-1]):
        for own, color, shift in zip(pair, COLORS[::4], (0.15, -0.15), strict=True):
            dots(ax, own, y + shift, color, bar=10)
    ax.set_yticks(range(len(every)), [labels()[name] for name in every][::-1], fontsize=9)
    ax.grid(axis="y", alpha=0.3)
    ax.set(xlabel="accuracy in percent, held-out emoji")
    ax.set_title("dots are seeds, bars are means; blue: V-MoE, orange: dense", fontsize=10)
    return figure


def _costs(rows: Rows) -> str:
    """One item per model; the minutes are a mean over the runs that were not stopped."""
    text = ""
    for model, of in rows.items():
        row = next(iter(of.values()))
        steps = " and ".join(f"{number:,}" for number in row["steps"])
        flops = " and ".join(f"{number / 1e6:.2f}" for number in row["flops_per_image"])
        seconds = [each["seconds"] for each in of.values() if each["seconds"]]
        minutes = f", {np.mean(seconds) / 60:.1f} minutes" if seconds else ""
        text += f"- {MODELS[model]}: {steps} steps, {flops} MFLOPs per image{minutes}.\n"
    return text


def main(arguments: Sequence[str]) -> None:
    parser = argument_parser("miniature", __doc__, MODELS)
    parser.add_argument("--data", type=Path, default=ROOT / "data" / "emoji")
    parser.add_argument("--steps", type=int, help="steps of each training, instead of the config's")
    options = parser.parse_args(arguments)
    print(table(Miniature(options).run(options.only)))
