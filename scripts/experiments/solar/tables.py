"""The tables of the experiment, and its answer."""

from collections.abc import Callable, Mapping
from typing import NamedTuple

import numpy as np

from scripts.experiments.framework.differences import Difference, corrected, signed, tested
from scripts.experiments.framework.pages import Answer, Tables, answer_of, markdown_table
from scripts.experiments.framework.runs import Rows
from scripts.experiments.solar.arms import BLOCKS, ON_FEATURES
from scripts.experiments.solar.data import FOLDS

BASE = "dense_active"
"""The arm that the others are compared with."""


class Cell(NamedTuple):
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


CELLS = {
    "solar_all": Cell("solar", "contiguous", None, 5, 1, "cells, all"),
    "solar_1000": Cell("solar", "contiguous", 1000, 8, 1, "cells, 1,000"),
    "solar_200": Cell("solar", "contiguous", 200, 15, 3, "cells, 200"),
    "solar_40": Cell("solar", "contiguous", 40, 30, 3, "cells, 40"),
    "solar_random": Cell("solar", "stratified", None, 5, 1, "cells, all, random folds"),
    "emoji_1000": Cell("emoji", "contiguous", 1000, 8, 1, "drawings, 1,000"),
    "clothes_1000": Cell("clothes", "contiguous", 1000, 8, 1, "clothes, 1,000"),
}
ARMS = {
    "probe": "linear probe",
    "dense": "dense, its own size",
    "dense_active": "dense, the active size",
    "dense_total": "dense, the total size",
    "moe_copies": "MoE, copies",
    "moe_noise": "MoE, copies with noise",
    "moe_drop": "MoE, copies with half of the units drawn again",
    "moe_split": "MoE, groups of the MLP's hidden units",
    "mixture": "classic mixture of the features",
    "shared_bottom": "two tasks, shared bottom",
    "mmoe": "two tasks, MMoE",
}
assert set(ARMS) == {*BLOCKS, *ON_FEATURES}


def arms_of(cell: Cell) -> list[str]:
    """The arms of a cell; only cells have a second task."""
    return [arm for arm in ARMS if cell.data == "solar" or arm not in ("shared_bottom", "mmoe")]


def by_fold(rows: Rows, cell: str, arm: str, figure: str = "") -> dict[int, float]:
    """The mean accuracy in percent of each fold over its draws, of the folds that were measured.

    Args:
        figure: see ``arms.measure``; by default that of two classes, if the cell has it.
    """
    found: dict[int, list[float]] = {}
    for seed, row in rows.get(f"{cell}_{arm}", {}).items():
        values = row["figures"][figure or "defect"] or row["figures"]["right"]
        found.setdefault(seed % FOLDS, []).append(100 * values.count("1") / len(values))
    return {fold: float(np.mean(values)) for fold, values in sorted(found.items())}


def difference(first: Mapping[int, float], second: Mapping[int, float]) -> Difference:
    """The mean of the first minus that of the second, over the folds that both have.

    The training images of two folds overlap, so the variance of the mean is larger than that of
    independent folds by (1/n + 1/(n - 1)) / (1/n) (Nadeau & Bengio 2003).
    """
    each = np.array([first[fold] - second[fold] for fold in first if fold in second])
    if len(each) < 2:
        return Difference(float(each.mean()) if len(each) else np.nan, np.inf, 1.0)
    variance = each.var(ddof=1) * (1 / len(each) + 1 / (FOLDS - 1))
    return tested(each.mean(), [(variance, len(each) - 1)])


def differences(rows: Rows) -> dict[tuple[str, str], Difference]:
    """By cell and arm: its accuracy minus that of ``BASE``, corrected for their number."""
    found = {}
    for name, cell in CELLS.items():
        base = by_fold(rows, name, BASE)
        for arm in arms_of(cell):
            own = by_fold(rows, name, arm)
            if arm != BASE and own.keys() & base.keys():
                found[name, arm] = difference(own, base)
    return corrected(found)


def accuracies(figure: str = "") -> Callable[[Rows], str]:
    """A table of the mean accuracy of each arm and cell."""

    def table(rows: Rows) -> str:
        lines = []
        for arm, label in ARMS.items():
            means = [by_fold(rows, cell, arm, figure) for cell in CELLS]
            if any(means):
                own = [f"{np.mean([*x.values()]):.1f}" if x else "-" for x in means]
                lines.append([label, *own])
        return markdown_table(["last block", *(cell.title for cell in CELLS.values())], lines)

    return table


def compared(rows: Rows) -> str:
    """The differences from the dense block of the active size."""
    found, lines = differences(rows), []
    for arm, label in ARMS.items():
        own = [found.get((cell, arm)) for cell in CELLS]
        if any(own):
            lines.append([label, *(signed(x, 1, mark=True) if x else "-" for x in own)])
    return markdown_table(["last block", *(cell.title for cell in CELLS.values())], lines)


def costs(rows: Rows) -> str:
    """Parameters, FLOPs and time of the last block, at the largest cell that was measured."""
    lines = []
    for arm, label in ARMS.items():
        every = [row["figures"] for cell in CELLS for row in rows.get(f"{cell}_{arm}", {}).values()]
        if every:
            ms = float(np.median([each["ms"] for each in every]))
            parameters = f"{every[0]['parameters'] / 1e6:.2f}"
            lines.append([label, parameters, f"{every[0]['gflops']:.2f}", f"{ms:.1f}"])
    columns = ["last block", "million parameters", "GFLOPs of an image", "ms of an image"]
    return markdown_table(columns, lines)


def rates(rows: Rows) -> str:
    """The learning rates that validation chose."""
    lines = []
    for arm in BLOCKS:
        for row in rows.get(f"rate_{arm}", {}).values():
            losses = ", ".join(f"{loss:.3f}" for loss in row["figures"]["losses"])
            lines.append([ARMS[arm], f"{row['figures']['rate']:g}", losses])
    return markdown_table(["last block", "rate", "log loss of each rate"], lines)


def answer(rows: Rows) -> str:
    """Where a sparse block is clearly better or worse than the dense one of the active size."""
    return answer_of([_sparse(rows)])


def _sparse(rows: Rows) -> Answer | None:
    found = {key: each for key, each in differences(rows).items() if key[1].startswith("moe")}
    if not found:
        return None
    clear = [
        f"{ARMS[arm]} is **{'better' if each.mean > 0 else 'worse'}** on {CELLS[cell].title}"
        for (cell, arm), each in found.items()
        if each.clear
    ]
    numbers = [
        f"{CELLS[cell].title}, {ARMS[arm]} {signed(each, 1)}" for (cell, arm), each in found.items()
    ]
    text = "; ".join(clear) or "no sparse block is clearly better or worse"
    return f"against a dense block of the active size: {text}", (
        "points of accuracy, sparse minus dense: " + "; ".join(numbers)
    )


TABLES: Tables = {
    "accuracy": ("Accuracy in percent (cells: defective or not)", accuracies()),
    "levels": ("Accuracy in percent (cells: four levels)", accuracies("right")),
    "compared": ("Points of accuracy above the dense block of the active size", compared),
    "costs": ("What the last block costs", costs),
    "rates": ("Learning rates", rates),
    "verdict": ("The answer", answer),
}
