"""The tables of the experiment, and its answer."""

from collections.abc import Callable, Iterable, Mapping
from typing import NamedTuple

import numpy as np

from scripts.experiments.framework.differences import (
    Difference,
    Key,
    corrected,
    p_value,
    signed,
    tested,
)
from scripts.experiments.framework.pages import (
    Answer,
    Tables,
    answer_of,
    figures_of,
    markdown_table,
    sections_of,
)
from scripts.experiments.framework.runs import Rows
from scripts.experiments.solar.arms import (
    BASES,
    COPIES,
    MLPS,
    ON_FEATURES,
    PILOT,
    TWO_TASKS,
)
from scripts.experiments.solar.data import FOLDS

RATES = (3e-5, 3e-4)
"""The peak learning rates that all arms of the test try."""
OVERLAP = 1 / (FOLDS - 2)
"""Images of a test, relative to those from which its training images come."""
ARMS = {
    "probe": "linear probe",
    "dense_half": "dense, half of the hidden units",
    "dense": "dense",
    "dense_active": "dense, twice the hidden units",
    "dense_total": "dense, four times the hidden units",
    "adapter": "adapter beside the frozen MLP",
    "moe_copies": "MoE, copies",
    "moe_noise": "MoE, copies with noise",
    "moe_drop": "MoE, copies with half of the units re-initialized",
    "moe_clusters": "MoE, copies and clusters of the tokens",
    "moe_split": "MoE, groups of the MLP's hidden units",
    "low_rank": "MoE, low-rank experts beside the frozen MLP",
    "mixture": "classic mixture of the features",
    "shared_bottom": "two tasks, shared bottom",
    "mmoe": "two tasks, MMoE",
}
assert set(ARMS) == {*MLPS, *ON_FEATURES}
SPARSE = [arm for arm, label in ARMS.items() if label.startswith("MoE")]
COMPARED = [*BASES.items(), ("moe_copies", "dense"), ("moe_copies", "dense_total")]
"""Arms and what they are compared with: of equal FLOPs; the MLP itself; of equal parameters."""


class Subset(NamedTuple):
    """Images of a data set.

    Attributes:
        data: the data set.
        folds: the kind of folds.
        size: images for training; None for all of three folds.
        steps: of training.
        draws: choices of these images in each fold.
        title: in tables.
        arms: those that are measured.
        rates: the peak learning rates that they try.
    """

    data: str
    folds: str
    size: int | None
    steps: int
    draws: int
    title: str
    arms: tuple[str, ...]
    rates: tuple[float, ...] = RATES


def _without(*arms: str) -> tuple[str, ...]:
    return tuple(arm for arm in ARMS if arm not in arms)


_SOME = _without("dense_total", "moe_noise", "moe_drop")
_FEW = ("probe", "dense", "dense_active", "moe_copies")
_ONE_TASK = _without("dense_total", *TWO_TASKS)
SUBSETS = {
    "solar_40": Subset("solar", "kin", 40, 100, 3, "cells, 40", _SOME),
    "solar_200": Subset("solar", "kin", 200, 100, 3, "cells, 200", _without("dense_total")),
    "solar_1000": Subset("solar", "kin", 1000, 250, 1, "cells, 1,000", tuple(ARMS)),
    "emoji_1000": Subset("emoji", "kin", 1000, 250, 1, "drawings, 1,000", _ONE_TASK),
    "clothes_1000": Subset("clothes", "kin", 1000, 250, 1, "clothes, 1,000", _ONE_TASK),
    "solar_all": Subset("solar", "kin", None, 250, 1, "cells, all", _SOME),
    "solar_random": Subset("solar", "random", None, 250, 1, "cells, all, random folds", _FEW),
    "solar_long": Subset("solar", "kin", 1000, 1000, 1, "cells, 1,000, long", _FEW[-2:]),
    "emoji_rates": Subset(
        *("emoji", "kin", 1000, 250, 1, "drawings, 1,000, larger rates", _FEW[-2:]),
        rates=(1e-3, 3e-3),
    ),
}
"""In the order in which they are measured."""
BESIDE = ("solar_random", "solar_long", "emoji_rates")
"""Subsets in no test and no answer: one whose test images have relatives among the training images,
for comparison with others' figures, one with four times the steps, which tells whether training was
too short, and one with the rates that were best in the pilot on drawings, added after its rows."""
TESTED = [name for name in SUBSETS if name not in BESIDE]
PRIMARY = [
    f"{name}_{arm}"
    for name in TESTED
    for arm in ("dense_active", *COPIES)
    if arm in SUBSETS[name].arms
]
"""The rows that the test needs; they are measured first."""
PILOTED = {
    f"pilot_{name}_{arm}": (SUBSETS[name], arm)
    for name in ("solar_1000", "emoji_1000")
    for arm in ("dense", "dense_active", "moe_copies", "low_rank")
}
"""What learning rates are tried with, on one fold."""


def by_fold(rows: Rows, subset: str, arm: str, figure: str = "") -> dict[int, float]:
    """The mean accuracy in percent of each fold over its draws; none before all are measured.

    Args:
        figure: see ``arms.measure``; by default that of two classes, if the subset has it.
    """
    found = {}
    for fold, row in rows.get(f"{subset}_{arm}", {}).items():
        draws = [draw[figure or "defect"] or draw["right"] for draw in row["figures"]["draws"]]
        found[fold] = 100 * float(np.mean([draw.count("1") / len(draw) for draw in draws]))
    return found if len(found) == FOLDS else {}


def mean_by_fold(
    rows: Rows, subset: str, arms: Iterable[str], figure: str = ""
) -> dict[int, float]:
    """As ``by_fold``, the mean over the arms that the subset has; none before all are measured."""
    own = [arm for arm in arms if arm in SUBSETS[subset].arms]
    every = [by_fold(rows, subset, arm, figure) for arm in own]
    if not every or not all(every):
        return {}
    return {fold: float(np.mean([each[fold] for each in every])) for fold in every[0]}


def difference(first: Mapping[int, float], second: Mapping[int, float]) -> Difference:
    """The mean of the first minus that of the second, over the folds.

    The training images of two folds overlap, so the variance of the mean is larger than that of n
    independent folds: (1/n + test images / training images) of the variance over the folds (Nadeau
    & Bengio 2003). Here a fold is tested, and training images come from three of them. Where they
    are a part of these, they overlap less, and the error is too large rather than too small.
    """
    each = np.array([first[fold] - second[fold] for fold in first])
    variance = each.var(ddof=1) * (1 / len(each) + OVERLAP)
    return tested(each.mean(), [(variance, len(each) - 1)])


def primary(rows: Rows) -> dict[str, Difference]:
    """By subset: the mean of the MoEs that start as copies minus the dense arm of equal FLOPs.

    This is what was to be tested before any row of an arm was made: one test for each of
    ``TESTED``, whose p are corrected for the number of these. The rule by which a rate counts was
    set before these rows too, but after the pilot on the validation images of one fold.
    """
    found = {}
    for name in SUBSETS:
        base, means = by_fold(rows, name, "dense_active"), mean_by_fold(rows, name, COPIES)
        if base and means:
            found[name] = difference(means, base)
    return _judged(found, lambda name: name in TESTED)


def all_tested(rows: Rows) -> bool:
    """Whether all of ``TESTED`` are measured; a p is corrected for their number, so not before."""
    return {*TESTED} <= primary(rows).keys()


def differences(rows: Rows) -> dict[tuple[str, str, str], Difference]:
    """By subset, arm and what it is compared with: the difference of each of ``COMPARED``.

    These explore. Their p are corrected for the number of those of ``TESTED``.
    """
    found = {}
    for name in SUBSETS:
        for arm, base in COMPARED:
            own, other = by_fold(rows, name, arm), by_fold(rows, name, base)
            if own and other:
                found[name, arm, base] = difference(own, other)
    return _judged(found, lambda key: key[0] in TESTED)


def _judged(
    found: Mapping[Key, Difference], is_tested: Callable[[Key], bool]
) -> dict[Key, Difference]:
    """Corrects those that are tested for their number; the others have a p of 1."""
    own = corrected({key: each for key, each in found.items() if is_tested(key)})
    return {key: each._replace(p=1.0) for key, each in found.items()} | own


def accuracies(subsets: Mapping[str, Subset], figure: str = "") -> Callable[[Rows], str]:
    """A table of the mean accuracy of each arm and subset, with its standard error."""

    def shown(own: Mapping[int, float]) -> str:
        found = difference(own, dict.fromkeys(own, 0.0))
        return signed(found, 1).removeprefix("+")

    def table(rows: Rows) -> str:
        lines = []
        for arm, label in ARMS.items():
            means = [by_fold(rows, subset, arm, figure) for subset in subsets]
            if any(means):
                lines.append([label, *(shown(each) if each else "-" for each in means)])
        return markdown_table(["last block", *_titles(subsets)], lines)

    return table


def primary_table(rows: Rows) -> str:
    """The difference that was to be tested, by subset; without p before all are measured."""
    lines, judged = [], all_tested(rows)
    for name, found in primary(rows).items():
        number = sum(arm in SUBSETS[name].arms for arm in COPIES)
        p = "not tested" if name in BESIDE else p_value(found.p) if judged else "not yet"
        lines.append([SUBSETS[name].title, str(number), signed(found, 1, mark=judged), p])
    return markdown_table(["images", "MoEs", "points above the dense block", "corrected p"], lines)


def compared(rows: Rows) -> str:
    """The differences of all arms."""
    found, lines = differences(rows), []
    for arm, base in COMPARED:
        own = [found.get((subset, arm, base)) for subset in SUBSETS]
        if any(own):
            shown = [signed(x, 1, mark=True) if x else "-" for x in own]
            lines.append([ARMS[arm], ARMS[base], *shown])
    return markdown_table(["last block", "compared with", *_titles(SUBSETS)], lines)


def progress(rows: Rows) -> str:
    """How many rows of each subset were measured."""
    lines = []
    for name, subset in SUBSETS.items():
        number = sum(len(rows.get(f"{name}_{arm}", {})) for arm in subset.arms)
        lines.append([subset.title, f"{number} of {len(subset.arms) * FOLDS}"])
    return markdown_table(["images", "rows measured"], lines if rows else [])


def _titles(subsets: Mapping[str, Subset]) -> list[str]:
    return [subset.title for subset in subsets.values()]


def costs(rows: Rows) -> str:
    """Parameters, FLOPs and time of the MLP or the experts."""
    lines = []
    for figures in figures_of(rows, "costs"):
        for arm, each in figures.items():
            parameters = [f"{each[name] / 1e6:.2f}" for name in ("parameters", "trained")]
            lines.append([ARMS[arm], *parameters, f"{each['gflops']:.2f}", f"{each['ms']:.1f}"])
    columns = ["MLP or experts", "parameters (millions)", "trained", "GFLOPs per image"]
    return markdown_table([*columns, "ms per image"], lines)


def rates(rows: Rows) -> str:
    """The steps of each subset, and how often validation chose each learning rate."""
    lines, every = [], sorted({rate for subset in SUBSETS.values() for rate in subset.rates})
    for name, subset in SUBSETS.items():
        chosen = [
            draw["rate"]
            for arm in MLPS
            for figures in figures_of(rows, f"{name}_{arm}")
            for draw in figures["draws"]
        ]
        if chosen:
            counts = [str(chosen.count(x)) if x in subset.rates else "-" for x in every]
            lines.append([subset.title, str(subset.steps), str(len(chosen)), *counts])
    return markdown_table(
        ["images", "steps", "MLPs or experts", *(f"{rate:g}" for rate in every)], lines
    )


def pilot(rows: Rows) -> str:
    """The validation of each learning rate that was tried at first."""
    lines = []
    for name, (subset, arm) in PILOTED.items():
        for figures in figures_of(rows, name):
            losses = [each["validation"] for each in figures["rates"]]
            lines.append([subset.title, ARMS[arm], *(f"{loss:.3f}" for loss in losses)])
    columns = ["images", "last block", "not trained", *(f"{rate:g}" for rate in PILOT)]
    return markdown_table(columns, lines)


def answer(rows: Rows) -> str:
    """Whether experts that start as copies are better than a dense block of equal FLOPs.

    There is none before all of ``TESTED`` are measured.
    """
    parts = [_primary(rows), _exploring(rows), _costs(rows)] if all_tested(rows) else []
    return answer_of(parts)


def _primary(rows: Rows) -> Answer:
    found = {SUBSETS[name].title: each for name, each in primary(rows).items() if name in TESTED}
    clear = [f"{_better(each)} on {name}" for name, each in found.items() if each.clear]
    text = "; ".join(clear) or f"clearly better or worse in none of {len(found)} tests"
    numbers = [f"{signed(each, 1)} ({name})" for name, each in found.items()]
    for word, sign in (("gain", 1), ("loss", -1)):
        bound, name = max((sign * each.mean + each.margin, name) for name, each in found.items())
        numbers.append(f"the largest {word} that is not excluded is {bound:.1f} ({name})")
    return (
        f"compared with a dense block of equal FLOPs, experts that start as copies are {text}",
        f"points of accuracy, sparse minus dense: {'; '.join(numbers)}",
    )


def _exploring(rows: Rows) -> Answer:
    found = {key: each for key, each in differences(rows).items() if key[0] in TESTED}
    clear = [
        f"{ARMS[arm]} is {_better(each)} than {ARMS[base]} on {SUBSETS[subset].title}"
        for (subset, arm, base), each in found.items()
        if each.clear
    ]
    means, number = [each.mean for each in found.values()], f"{len(found)} exploratory comparisons"
    return (
        f"of {number} of single arms, {'these are clear: ' * bool(clear)}"
        f"{'; '.join(clear) or 'none is clear'}",
        f"{number}: {min(means):+.1f} to {max(means):+.1f}",
    )


def _costs(rows: Rows) -> Answer | None:
    for figures in figures_of(rows, "costs"):
        sparse, dense = figures["moe_copies"], figures["dense_active"]
        more, slower = (sparse[name] / dense[name] for name in ("parameters", "ms"))
        return (
            f"the copies have {more:.1f} times the parameters of that dense block and take "
            f"{slower:.1f} times as long",
            f"{sparse['ms']:.1f} instead of {dense['ms']:.1f} ms an image",
        )
    return None


def _better(found: Difference) -> str:
    return f"**{'better' if found.mean > 0 else 'worse'}**"


CELLS = {name: subset for name, subset in SUBSETS.items() if subset.data == "solar"}
TABLES: Tables = {
    "accuracy": ("Accuracy in percent (cells: defective or not)", accuracies(SUBSETS)),
    "levels": ("Accuracy in percent, four levels", accuracies(CELLS, "right")),
    "tested": ("MoEs that start as copies, against dense of equal FLOPs", primary_table),
    "compared": ("Differences of all arms in points of accuracy", compared),
    "costs": ("What the MLP or the experts cost", costs),
    "pilot": ("Log loss on validation by learning rate, one fold", pilot),
    "rates": ("Steps, and how often each rate was chosen", rates),
    "progress": ("What was measured", progress),
    "answer": ("The answer", answer),
}


def sections(rows: Rows, machine: str) -> dict[str, str]:
    """The generated sections of docs/results/real.md by name.

    Args:
        machine: where and when the rows were made.
    """
    return sections_of("solar", TABLES, rows, answer(rows), machine)
