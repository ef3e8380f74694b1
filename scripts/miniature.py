"""Pre-training, few-shot probes and fine-tuning in miniature: emoji, V-MoE and its dense twin.

    python scripts/prepare_emoji.py data/emoji
    python scripts/miniature.py             # trains and measures what is missing; prints
    python scripts/miniature.py --write     # also writes the table in configs/README.md

For each model and seed: pre-training on the words of Google's drawings (configs/emoji_pretrain.py),
linear probes of its features on the categories of each vendor's drawings, fine-tuning on the
categories of Google's (configs/emoji_finetune.py), and accuracies on the held-out emoji of both
vendors. No training, probe or choice has seen an emoji of the test split, of either vendor. The
recipes say what was tried.

The figures of a model and seed are one committed JSON file, configs/miniature/MODEL-SEED.json; one
that has it is neither trained nor measured again. A file of an earlier version, which does not say
in which order images were evaluated, is replaced. The script can be stopped at any time and started
again: training resumes.
"""

import argparse
import json
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
from experiments import (
    ROOT,
    Comparison,
    Result,
    Rows,
    argument_parser,
    jax_versions,
    markdown_table,
    percents,
    versions,
    write_section,
)

from vmoe.config import TrainConfig, load, replace
from vmoe.costs.flops import cost
from vmoe.data.pipeline import ORDER

MODELS = {"sparse": "V-MoE", "dense": "dense twin"}
PARTS = ("pretrain", "finetune")
SHOTS = (1, 5, 10, 25)
VENDORS = {"google": "the vendor of the training", "twitter": "the other vendor"}


def train_config(part: str, model: str, data: Path, steps: int | None) -> TrainConfig:
    """A recipe.

    Args:
        part: one of ``PARTS``.
        data: the folder of the data set.
        steps: in place of the recipe's.
    """
    suffix = "" if model == "sparse" else f"_{model}"
    recipe = load(ROOT / "configs" / f"emoji_{part}{suffix}.py")
    steps = steps or recipe.total_steps
    return replace(
        recipe,
        data={"name": f"manifest:{data / Path(recipe.data.name).name}"},
        steps=steps,
        optim={"warmup_steps": min(recipe.optim.warmup_steps, steps // 2)},
    )


class Miniature(Comparison):
    """The runs of both models."""

    needs = "order"

    def __init__(self, options: argparse.Namespace) -> None:
        super().__init__(options)
        self.data = options.data.absolute()

    def configs(self, model: str) -> list[TrainConfig]:
        """Of pre-training and of fine-tuning."""
        return [train_config(part, model, self.data, self.options.steps) for part in PARTS]

    def settings(self, model: str) -> Result:
        return {"steps": [config.steps for config in self.configs(model)], "order": ORDER}

    def measure(self, model: str, seed: int) -> Result:
        configs = self.configs(model)
        for config in configs:
            if not (file := Path(config.data.name.removeprefix("manifest:"))).is_file():
                raise SystemExit(f"{file}: no such file; make it with scripts/prepare_emoji.py")
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
        """The accuracy on a split of a list; of several labels each is right."""
        data = f"manifest:{self.data / split}"
        out = self.vmoe("evaluate", "--checkpoint", run, "--data", data, "--json")
        return json.loads(out)["accuracy"]

    def probes(self, run: Path, seed: int) -> Iterator[tuple[str, float]]:
        """Accuracies of probes on the test splits, from shots of the training splits."""
        data = {vendor: f"manifest:{self.data / vendor}.csv" for vendor in VENDORS}
        options = ("--fewshot-l2", "train", "--fewshot-seed", seed, "--json")
        shots = ",".join(map(str, SHOTS))
        command = ("evaluate", "--checkpoint", run, "--data", *data.values(), "--fewshot", shots)
        accuracies = json.loads(self.vmoe(*command, *options))["accuracy"]
        for vendor, name in data.items():
            for number, value in zip(SHOTS, accuracies[name], strict=True):
                yield f"probe.{number}.{vendor}", value


def section(rows: Rows) -> str:
    """What the rows show, as Markdown."""
    labels = {"words": "pre-trained: the likeliest word is one of its words"}
    for vendor, text in VENDORS.items():
        for number in SHOTS:
            labels[f"probe.{number}.{vendor}"] = f"probe, shots per category: {number}; {text}"
    for vendor, text in VENDORS.items():
        labels[f"finetuned.{vendor}"] = f"fine-tuned; {text}"
    measured = {model: rows[model] for model in MODELS if model in rows}
    columns = ["accuracy in percent, held-out emoji"]
    for model, of in measured.items():
        columns += [f"{MODELS[model]}, seeds {', '.join(map(str, sorted(of)))}", "mean"]
    lines = []
    for figure, label in labels.items():
        line = [label]
        for of in measured.values():
            line += percents(100 * row["figures"][figure] for _, row in sorted(of.items()))
        lines.append(line)
    return f"{markdown_table(columns, lines)}\n\n{_costs(measured)}{jax_versions(rows)}.\n"


def _costs(rows: Rows) -> str:
    """A line per model; the minutes are a mean over the runs that were not stopped."""
    text = ""
    for model, of in rows.items():
        row = next(iter(of.values()))
        steps = " and ".join(f"{number:,}" for number in row["steps"])
        flops = " and ".join(f"{number / 1e6:.2f}" for number in row["flops_per_image"])
        seconds = [each["seconds"] for each in of.values() if each["seconds"]]
        minutes = f", {np.mean(seconds) / 60:.1f} minutes" if seconds else ""
        text += f"{MODELS[model]}: {steps} steps, {flops} MFLOPs per image{minutes}.\n"
    return text


def main() -> None:
    parser = argument_parser(__doc__.splitlines()[0], "miniature", "file with the table to replace")
    parser.add_argument("--data", type=Path, default=ROOT / "data" / "emoji")
    parser.add_argument("--only", choices=MODELS, help="this model")
    parser.add_argument("--steps", type=int, help="of each training, in place of the recipe's")
    options = parser.parse_args()
    rows = Miniature(options).run([options.only] if options.only else MODELS)
    text = section(rows)
    print(text)
    if options.write:
        write_section(options.write, "miniature.py", text)


if __name__ == "__main__":
    main()
