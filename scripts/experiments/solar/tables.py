"""The tables of the experiment, and its answer."""

import math
from collections.abc import Callable, Mapping
from typing import NamedTuple

import numpy as np
import scipy.stats

from scripts.experiments.framework.differences import (
    LEVEL,
    Difference,
    corrected,
    signed,
    tested,
)
from scripts.experiments.framework.pages import Answer, Tables, answer_of, markdown_table
from scripts.experiments.framework.runs import Rows
from scripts.experiments.solar.arms import BASES, MLPS, ON_FEATURES, RATES
from scripts.experiments.solar.data import FOLDS

OVERLAP = 1 / (FOLDS - 2)
"""Images of a test, relative to those from which its training images come."""


class Subset(NamedTuple):
    """Images of a data set.

    Attributes:
        data: the data set.
        folds: the kind of folds.
        size: images for training and validation; None for all outside of a fold.
        epochs: of training.
        draws: choices of these images in each fold.
    """

    data: str
    folds: str
    size: int | None
    epochs: int
    draws: int
    title: str


SUBSETS = {
    "solar_40": Subset("solar", "kin", 40, 40, 3, "cells, 40"),
    "solar_200": Subset("solar", "kin", 200, 15, 3, "cells, 200"),
    "solar_1000": Subset("solar", "kin", 1000, 8, 1, "cells, 1,000"),
    "emoji_1000": Subset("emoji", "kin", 1000, 8, 1, "drawings, 1,000"),
    "clothes_1000": Subset("clothes", "kin", 1000, 8, 1, "clothes, 1,000"),
    "solar_all": Subset("solar", "kin", None, 5, 1, "cells, all"),
    "solar_random": Subset("solar", "random", None, 5, 1, "cells, all, random folds"),
}
"""In the order in which they are measured."""
KIN_IN_TRAINING = "solar_random"
"""A subset whose test images have relatives among the training images; for comparison with others'
figures, and in no answer."""
ARMS = {
    "probe": "linear probe",
    "dense_half": "dense, half of the hidden units",
    "dense": "dense",
    "dense_active": "dense, twice the hidden units",
    "dense_total": "dense, four times the hidden units",
    "adapter": "adapter beside the frozen MLP",
    "moe_copies": "MoE, copies",
    "moe_noise": "MoE, copies with noise",
    "moe_drop": "MoE, copies with half of the units drawn again",
    "moe_clusters": "MoE, copies and clusters of the tokens",
    "moe_split": "MoE, groups of the MLP's hidden units",
    "low_rank": "MoE, low-rank experts beside the frozen MLP",
    "mixture": "classic mixture of the features",
    "shared_bottom": "two tasks, shared bottom",
    "mmoe": "two tasks, MMoE",
}
assert set(ARMS) == {*MLPS, *ON_FEATURES}
SPARSE = [arm for arm, label in ARMS.items() if label.startswith("MoE")]


def arms_of(subset: Subset) -> list[str]:
    """The arms of a subset; only solar cells have a second task."""
    return [arm for arm in ARMS if subset.data == "solar" or arm not in ("shared_bottom", "mmoe")]


def by_fold(rows: Rows, subset: str, arm: str, figure: str = "") -> dict[int, float]:
    """The mean accuracy in percent of each fold over its draws, of the folds that were measured.

    Args:
        figure: see ``arms.measure``; by default that of two classes, if the subset has it.
    """
    found = {}
    for fold, row in rows.get(f"{subset}_{arm}", {}).items():
        draws = [draw[figure or "defect"] or draw["right"] for draw in row["figures"]["draws"]]
        found[fold] = 100 * float(np.mean([draw.count("1") / len(draw) for draw in draws]))
    return found


def difference(first: Mapping[int, float], second: Mapping[int, float]) -> Difference:
    """The mean of the first minus that of the second, over the folds that both have.

    The training images of two folds overlap, so the variance of the mean is larger than that of n
    independent folds: (1/n + test images / training images) of the variance over the folds (Nadeau
    & Bengio 2003). Here a fold is tested, and training images come from three of them. Where they
    are a part of these, they overlap less, and the error is too large rather than too small.
    """
    each = np.array([first[fold] - second[fold] for fold in first if fold in second])
    if len(each) < 2:
        return Difference(float(each.mean()) if len(each) else np.nan, np.inf, 1.0)
    variance = each.var(ddof=1) * (1 / len(each) + OVERLAP)
    return tested(each.mean(), [(variance, len(each) - 1)])


def differences(rows: Rows) -> dict[tuple[str, str], Difference]:
    """By subset and arm: its accuracy minus that of its base, corrected for their number."""
    found = {}
    for name, subset in SUBSETS.items():
        for arm in arms_of(subset):
            if arm in BASES:
                own, base = by_fold(rows, name, arm), by_fold(rows, name, BASES[arm])
                if own.keys() & base.keys():
                    found[name, arm] = difference(own, base)
    return corrected(found)


def accuracies(figure: str = "") -> Callable[[Rows], str]:
    """A table of the mean accuracy of each arm and subset."""

    def table(rows: Rows) -> str:
        lines = []
        for arm, label in ARMS.items():
            means = [by_fold(rows, subset, arm, figure) for subset in SUBSETS]
            if any(means):
                own = [f"{np.mean([*x.values()]):.1f}" if x else "-" for x in means]
                lines.append([label, *own])
        return markdown_table(["last block", *_titles()], lines)

    return table


def compared(rows: Rows) -> str:
    """The differences from the dense arm of equal FLOPs."""
    found, lines = differences(rows), []
    for arm, base in BASES.items():
        own = [found.get((subset, arm)) for subset in SUBSETS]
        if any(own):
            shown = [signed(x, 1, mark=True) if x else "-" for x in own]
            lines.append([ARMS[arm], ARMS[base], *shown])
    return markdown_table(["last block", "compared with", *_titles()], lines)


def progress(rows: Rows) -> str:
    """How many rows of each subset were measured."""
    lines = []
    for name, subset in SUBSETS.items():
        names = [f"{name}_{arm}" for arm in arms_of(subset)]
        number = sum(len(rows.get(each, {})) for each in names)
        lines.append([subset.title, f"{number} of {len(names) * FOLDS}"])
    return markdown_table(["images", "rows measured"], lines if rows else [])


def _titles() -> list[str]:
    return [subset.title for subset in SUBSETS.values()]


def costs(rows: Rows) -> str:
    """Parameters, FLOPs and time of the MLP or the experts."""
    lines = []
    for row in rows.get("costs", {}).values():
        for arm, each in row["figures"].items():
            parameters = f"{each['parameters'] / 1e6:.2f}"
            lines.append([ARMS[arm], parameters, f"{each['gflops']:.2f}", f"{each['ms']:.1f}"])
    columns = ["MLP or experts", "parameters (millions)", "GFLOPs per image", "ms per image"]
    return markdown_table(columns, lines)


def rates(rows: Rows) -> str:
    """How often validation chose each learning rate, or the start."""
    lines = []
    for arm in MLPS:
        draws = [
            draw
            for subset in SUBSETS
            for row in rows.get(f"{subset}_{arm}", {}).values()
            for draw in row["figures"]["draws"]
        ]
        if draws:
            chosen = [draw["rate"] if draw["epoch"] else 0 for draw in draws]
            lines.append([ARMS[arm], *(str(chosen.count(rate)) for rate in (0, *RATES))])
    return markdown_table(["last block", "not trained", *(f"{rate:g}" for rate in RATES)], lines)


def answer(rows: Rows) -> str:
    """Where a sparse block is clearly better or worse than the dense one of equal FLOPs."""
    return answer_of([_sparse(rows)])


def _sparse(rows: Rows) -> Answer | None:
    found = {
        key: each
        for key, each in differences(rows).items()
        if key[1] in SPARSE and key[0] != KIN_IN_TRAINING and math.isfinite(each.error)
    }
    if not found:
        return None
    clear = [
        f"{ARMS[arm]} is **{'better' if each.mean > 0 else 'worse'}** on {SUBSETS[subset].title}"
        for (subset, arm), each in found.items()
        if each.clear
    ]
    text = "; ".join(clear) or "no sparse block is clearly better or worse"
    bounds = {
        f"{word} that is not excluded": max(
            (sign * each.mean + _margin(each), key) for key, each in found.items()
        )
        for word, sign in (("gain", 1), ("loss", -1))
    }
    means = [each.mean for each in found.values()]
    numbers = [
        f"{len(found)} differences in points of accuracy, sparse minus dense: "
        f"{min(means):+.1f} to {max(means):+.1f}",
        *(
            f"the largest {name} is {bound:.1f} ({SUBSETS[subset].title}, {ARMS[arm]} "
            f"{signed(found[subset, arm], 1)})"
            for name, (bound, (subset, arm)) in bounds.items()
        ),
    ]
    return f"against a dense block of equal FLOPs: {text}", "; ".join(numbers)


def _margin(found: Difference) -> float:
    """Half of the interval that has the true difference in 95% of all cases."""
    return found.error * float(scipy.stats.t.isf(LEVEL / 2, found.degrees))


TABLES: Tables = {
    "accuracy": ("Accuracy in percent (cells: defective or not)", accuracies()),
    "levels": ("Accuracy in percent (cells: four levels)", accuracies("right")),
    "compared": ("Points of accuracy above the dense block of equal FLOPs", compared),
    "costs": ("What the MLP or the experts cost", costs),
    "rates": ("How often each learning rate was chosen", rates),
    "progress": ("What was measured", progress),
    "answer": ("The answer", answer),
}
