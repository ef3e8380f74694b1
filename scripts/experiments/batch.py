"""The table and the plot of docs/results/batch.md about the other images of a group.

Their rows are what the command of that page prints with ``--json``.
"""

import math
from collections.abc import Mapping, Sequence
from typing import Any

from matplotlib import pyplot

from scripts.experiments.framework.pages import markdown_table
from scripts.experiments.framework.plots import COLORS

MATES = {
    "none": "alone",
    "mean of the draws": "mean of 256 draws",
    "worst of the draws": "worst of 256 draws",
    "first draw": "first draw",
    "optimized": "optimized",
    "random signs": "random signs",
}
"""The other images of a group, by their name in a row."""
VICTIMS = 128  # of the command


def sections(rows: Sequence[Mapping[str, Any]]) -> dict[str, str]:
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


def plot(rows: Sequence[Mapping[str, Any]]) -> Any:
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
