"""Compares per-block with uniform routing on images that `vmoe capacity` has not seen.

    python scripts/check_capacity.py vmoe_fashion_mnist --data fashion_mnist
    python scripts/check_capacity.py runs/emoji-0 runs/emoji-1 runs/emoji-2 --data folder:data/emoji

For each model, `vmoe capacity` searches on the validation split. For each budget, its setting and
the best uniform one, which is the same in all blocks, are evaluated on the test split. Prints a
table in Markdown: accuracies in percent, means over the models, and their difference. Its standard
error is over the images, each with its mean over the models; other models may differ more. The last
column shows the first model. docs/results/compute.md has the results.
"""

import argparse
import json
import subprocess
import sys
import tempfile
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
from experiments import markdown_table

import vmoe
from vmoe import models
from vmoe.analysis.statistics import error_of_difference
from vmoe.config.routing_file import LayerSetting
from vmoe.data.sources import open_source
from vmoe.evaluate import Evaluation, evaluate
from vmoe.nn.inputs import has_label
from vmoe.studies.capacity.settings import with_setting

Row = dict[str, Any]
COLUMNS = (
    *("budget", "per-block, test", "uniform, test", "difference"),
    *("per-block, validation", "uniform, validation", "k, capacity factor, priority by block"),
)


def rows_of(checkpoint: str, data: str, images: int) -> dict[float, Row]:
    """By budget: the settings of `vmoe capacity`, and their evaluations on the test split."""
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, "-m", "vmoe", "capacity", "--checkpoint", checkpoint]
        command += ["--data", data, "--budget", "1x", "--images", str(images), "--json"]
        command += ["--out", str(Path(folder) / "routing.json")]
        found = subprocess.run(command, stdout=subprocess.PIPE, text=True)
        if found.returncode:
            sys.exit(found.returncode)
    loaded, source = vmoe.load(checkpoint), open_source(data, "test")
    params, evaluated = models.params_of(loaded.model), dict[str, Evaluation]()

    def on_test(setting: list[dict[str, Any]]) -> Evaluation:
        name = json.dumps(setting)
        if name not in evaluated:
            layers = tuple(LayerSetting(**layer) for layer in setting)
            model = models.with_params(with_setting(loaded.model.config, layers), params)
            evaluated[name] = evaluate(model, source, preprocessing=loaded.preprocessing)
        return evaluated[name]

    rows = json.loads(found.stdout)["trade_off"]
    return {
        row["budget"]: row
        | {f"test{which}": on_test(row[f"setting{which}"]) for which in ("", "_uniform")}
        for row in rows
        if row["setting_uniform"]
    }


def lines_of(every: list[dict[float, Row]]) -> Iterable[list[str]]:
    for budget in every[0]:
        rows = [of_model[budget] for of_model in every if budget in of_model]
        per_block, uniform = (
            np.mean([row[name].per_example.correct for row in rows], axis=0)
            for name in ("test", "test_uniform")
        )
        labeled = has_label(rows[0]["test"].per_example.labels)
        per_block, uniform = per_block[labeled], uniform[labeled]  # all models have the same images
        difference, error = (per_block - uniform).mean(), error_of_difference(per_block, uniform)
        accuracies = [
            *([row[name].accuracy for row in rows] for name in ("test", "test_uniform")),
            *([row[name] for row in rows] for name in ("accuracy", "accuracy_uniform")),
        ]
        shown = [f"{100 * np.mean(own):.2f}" for own in accuracies]
        shown.insert(2, f"{100 * difference:+.2f} ± {100 * error:.2f}")
        settings = "; ".join(
            f"{each['k']}, {each['capacity_factor']:g}, {each['priority'].replace('_', ' ')}"
            for each in rows[0]["setting"]
        )
        yield [f"{budget:g}x", *shown, settings]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("checkpoints", nargs="+", help="models, as for vmoe evaluate")
    parser.add_argument("--data", required=True, help="a data set with three splits")
    parser.add_argument("--images", type=int, default=1024, help="of the validation split")
    options = parser.parse_args()
    every = [rows_of(each, options.data, options.images) for each in options.checkpoints]
    print(markdown_table(COLUMNS, lines_of(every)))


if __name__ == "__main__":
    main()
