"""Compares per-block with uniform routing on images that `vmoe capacity` has not seen.

    python -m scripts.experiments check_capacity vmoe_fashion_mnist --data fashion_mnist
    python -m scripts.experiments check_capacity runs/emoji-{0,1,2} --data folder:data/emoji

For each model, `vmoe capacity` searches on the validation split. For each budget, its setting and
the best uniform one, which is the same in all blocks, are evaluated on the test split. Prints a
table in Markdown: accuracies in percent, means over the models, and two differences: from uniform,
and from the model as trained, on the same images. Their standard errors are over the images, each
with its mean over the models; other models may differ more. Both drawings of an emoji are one
observation. The last column shows the first model. docs/results/compute.md has the results.
"""

import argparse
import json
import math
import subprocess
import sys
import tempfile
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib import pyplot

import vmoe
from scripts.experiments.framework.differences import (
    Difference,
    corrected,
    signed,
    tested,
)
from scripts.experiments.framework.pages import answer, markdown_table
from scripts.experiments.framework.plots import COLORS, MARKS
from scripts.experiments.framework.runs import Lines
from scripts.prepare.emoji import emoji_of
from vmoe import models
from vmoe.analysis.statistics import standard_error
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
            error = standard_error(per_block - other, groups)
            shown.append(f"{100 * (per_block - other).mean():+.2f} ± {100 * error:.2f}")
        for name in ("accuracy", "accuracy_uniform"):
            shown.append(f"{100 * np.mean([row[name] for row in rows]):.2f}")
        settings = "; ".join(
            f"{each['k']}, {each['capacity_factor']:g}, {each['priority'].replace('_', ' ')}"
            for each in rows[0]["setting"]
        )
        yield [f"{budget:g}x", *shown, settings]


def sections(lines: Lines) -> dict[str, str]:
    """The answer and the tables of the capacity search, one for each key of ``SEARCHED``."""
    of = {
        data: {line["budget"]: line for line in lines if line["data"] == data} for data in SEARCHED
    }
    own = {data: {each: differences(line) for each, line in of[data].items()} for data in of}
    from_uniform, from_trained = (
        {
            data: corrected({budget: x for budget, pair in every.items() if (x := pair[i])})
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
    text = f"""with {1 - float(SAVED):.0%} fewer FLOPs, {"; ".join(losses)}. A setting for each
        block is better than a uniform one at few budgets"""
    numbers = [
        f"{text} {signed(x)}"
        if (x := from_trained[data].get(SAVED))
        else f"{text} {of[data][SAVED]['from trained']}, without an error"
        for data, text in SEARCHED.items()
    ]
    numbers = [
        f"points at {SAVED}x minus as trained: {', '.join(numbers)}",
        f"per-block is clearly better than uniform at {', '.join(better)}",
    ]
    tables = {data: _searched(of[data], from_uniform[data], from_trained[data]) for data in of}
    return {"answer": answer([text], numbers)} | tables


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
    columns = ["budget", "per-block", "uniform", "per-block − uniform", "per-block − as trained"]
    columns += ["per-block, validation", "uniform, validation"]
    columns += ["k, capacity factor, priority of blocks 1; 3; 5"]
    return markdown_table(
        columns,
        (
            [
                f"{budget}x",
                *(line["per-block"], line["uniform"]),
                signed(from_uniform[budget], bound=line["data"] == "emoji", mark=True),
                signed(from_trained[budget], mark=True)
                if budget in from_trained
                else f"{float(line['from trained']):+.2f}",
                *(line["per-block validation"], line["uniform validation"]),
                line["per-block setting"],
            ]
            for budget, line in lines.items()
        ),
    )


def plot(lines: Lines) -> Any:
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


def main(arguments: Sequence[str]) -> None:
    parser = argparse.ArgumentParser(
        "python -m scripts.experiments check_capacity", description=__doc__.splitlines()[0]
    )
    parser.add_argument("checkpoints", nargs="+", help="models, as for vmoe evaluate")
    parser.add_argument("--data", required=True, help="a data set with three splits")
    parser.add_argument("--images", type=int, default=1024, help="of the validation split")
    options = parser.parse_args(arguments)
    every = [rows_of(each, options.data, options.images) for each in options.checkpoints]
    print(markdown_table(COLUMNS, lines_of(every)))
