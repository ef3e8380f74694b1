"""Compares per-block with uniform routing on images that `vmoe capacity` has not seen.

    python scripts/check_capacity.py vmoe_fashion_mnist --data fashion_mnist
    python scripts/check_capacity.py runs/emoji-0 runs/emoji-1 runs/emoji-2 --data folder:data/emoji

For each model, `vmoe capacity` searches on the validation split. For each budget, its setting and
the best uniform one, which is the same in all blocks, are evaluated on the test split. Prints a
table in Markdown: accuracies in percent, means over the models, and two differences: from uniform,
and from the model as trained, on the same images. Their standard errors are over the images, each
with its mean over the models; other models may differ more. Both drawings of an emoji are one
observation. The last column shows the first model. docs/results/compute.md has the results.
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
from differences import error_over_images
from experiments import markdown_table
from prepare_emoji import emoji_of

import vmoe
from vmoe import models
from vmoe.config.routing_file import LayerSetting
from vmoe.data.sources import open_source
from vmoe.evaluate import Evaluation, evaluate
from vmoe.nn.inputs import has_label
from vmoe.studies.capacity.settings import with_setting

Row = dict[str, Any]
COLUMNS = (
    *("budget", "as trained, test", "per-block, test", "uniform, test"),
    *("per-block − uniform", "per-block − as trained"),
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
    trained = evaluate(loaded.model, source, preprocessing=loaded.preprocessing)
    groups = emoji_of(source[i].origin for i in trained.indices.tolist())

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
        | {"trained": trained, "groups": groups}
        for row in rows
        if row["setting_uniform"]
    }


def lines_of(every: list[dict[float, Row]]) -> Iterable[list[str]]:
    for budget in every[0]:
        rows = [of_model[budget] for of_model in every if budget in of_model]
        labeled = has_label(rows[0]["test"].per_example.labels)  # all models have the same images
        groups = np.array(rows[0]["groups"])[labeled]
        trained, per_block, uniform = (
            np.mean([row[name].per_example.correct for row in rows], axis=0)[labeled]
            for name in ("trained", "test", "test_uniform")
        )
        shown = [f"{100 * own.mean():.2f}" for own in (trained, per_block, uniform)]
        for other in (uniform, trained):
            error = error_over_images(per_block - other, groups)
            shown.append(f"{100 * (per_block - other).mean():+.2f} ± {100 * error:.2f}")
        for name in ("accuracy", "accuracy_uniform"):
            shown.append(f"{100 * np.mean([row[name] for row in rows]):.2f}")
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
