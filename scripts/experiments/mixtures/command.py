"""Repeats published results of classic mixtures of experts: docs/results/mixtures.md.

    python -m scripts.prepare.mixtures data/mixtures --debian FOLDER    # see there
    python -m scripts.experiments mixtures               # measures what is missing; prints
    python -m scripts.experiments mixtures --picture     # also draws the lines of tone perception
    python -m scripts.experiments results                # then writes docs/results

    vowels     Jacobs et al. 1991, table 1: experts and networks tell vowels apart, 25 starts
    arm_...    Jordan & Jacobs 1994, table 1: six methods learn a simulated arm, five draws
    tone, no   how many lines two data sets of R's mixtools have, by BIC and ICL
    noise      how often 90% intervals hold new targets if trees and others are the experts
    stored     the estimators against results of R's flexmix and mixtools on their own data
    coverage_...  how often 95% intervals of parameters hold the truth, on simulated data
    trees_...  the soft tree, CART, a forest and boosting: 5x2cv F test and McNemar's test

The figures of a run are a line of scripts/experiments/rows/mixtures.jsonl. A run with such a line
is not repeated. The command can be stopped at any time and started again. Rows are kept apart by
their size and by the SHA-256 of their data; ``--tiny`` tries it in seconds.
"""

from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import matplotlib
import scipy
import sklearn

from scripts.experiments.framework.figures import Part, figures_parser, measured
from scripts.experiments.framework.runs import ROOT
from scripts.experiments.mixtures import (
    coverage,
    lines,
    methods,
    noise,
    plots,
    stored,
    trees,
    vowels,
)
from scripts.experiments.mixtures.data import checksum
from scripts.experiments.mixtures.tables import TABLES

PICTURE = ROOT / "docs" / "results" / "mixtures_tone.png"


class Size(NamedTuple):
    """How large the parts are.

    Attributes:
        passes: largest number of passes through the vowels.
        starts: number of starts of EM on tone perception and nitrogen oxides.
        steps: largest number of EM steps on these and against R.
        share: fraction of the rows of the arm, and of those for the noise.
        settings: how many settings each method tries on the arm; None for all.
        sets: how many data sets have intervals by the information. By a bootstrap, a row has 4% of
            them, with a fifth of this number as refits.
        rows: how many rows, or speakers, a data set of the trees has; None for all.
        classifiers: sizes for ``trees.make``.
    """

    passes: int
    starts: int
    steps: int
    share: float
    settings: int | None
    sets: int
    rows: int | None
    classifiers: dict[str, Any]


SIZES = {
    "full": Size(
        passes=4_000,
        starts=20,
        steps=3_000,
        share=1.0,
        settings=None,
        sets=500,
        rows=None,
        classifiers={
            "branchings": [(2, 2), (2,)],
            "steps": 30,
            "trees": 300,
            "rounds": 100,
            "folds": 3,
        },
    ),
    "tiny": Size(
        passes=30,
        starts=1,
        steps=20,
        share=0.02,
        settings=1,
        sets=25,
        rows=60,
        classifiers={"branchings": [(2,)], "steps": 1, "trees": 3, "rounds": 3, "folds": 0},
    ),
}


def _part(
    seeds: int, tables: Iterable[str], figures: Callable[[Path, int, Size], dict[str, Any]]
) -> Part:
    """A part.

    Args:
        tables: names of the tables that it reads.
        figures: its function; the arguments are the folder of the tables, a seed and a size.
    """
    return Part(
        seeds,
        lambda options, seed: figures(options.data, seed, SIZES[options.size]),
        lambda options: {name: checksum(options.data, name) for name in tables},
    )


def _arm(name: str) -> Part:
    return _part(
        5, (), lambda _, seed, size: methods.measure(name, seed, size.share, size.settings)
    )


def _coverage(case: coverage.Case) -> Part:
    refitted = case.summary is coverage.bootstrap

    def figures(_: Path, seed: int, size: Size) -> dict[str, Any]:
        sets = size.sets // (25 if refitted else 1)
        seeds = range(seed * sets, (seed + 1) * sets)
        return coverage.measure(case, seeds, refits=size.sets // 5)

    return _part(25 if refitted else 4, (), figures)


def _lines(name: str) -> Part:
    return _part(
        1, (name,), lambda folder, _, size: lines.measure(folder, name, size.starts, size.steps)
    )


def _trees(name: str) -> Part:
    tables = () if name in trees.SKLEARN else (name,)
    return _part(
        1,
        tables,
        lambda folder, _, size: trees.measure(name, folder, size.rows, size.classifiers),
    )


PARTS = {
    "vowels": _part(
        25, ("vowels",), lambda folder, seed, size: vowels.measure(folder, seed, size.passes)
    ),
    **{f"arm_{name}": _arm(name) for name in methods.METHODS},
    **{name: _lines(name) for name in lines.COLUMNS},
    "noise": _part(5, (), lambda _, seed, size: noise.measure(seed, size.share)),
    "stored": _part(
        1, ("npreg", "no", "tone"), lambda folder, _, size: stored.measure(folder, size.steps)
    ),
    **{f"coverage_{name}": _coverage(case) for name, case in coverage.CASES.items()},
    **{f"trees_{name}": _trees(name) for name in trees.LABELS},
}
"""What is measured, by name."""


def main(arguments: Sequence[str]) -> None:
    parser = figures_parser("mixtures", __doc__, PARTS, data="mixtures")
    parser.add_argument("--picture", type=Path, nargs="?", const=PICTURE, help="draws to a file")
    options = parser.parse_args(arguments)
    rows = measured(options, PARTS, (scipy, sklearn), TABLES)
    if rows and options.picture:
        matplotlib.use("Agg")
        plots.tone(rows, options.data).savefig(options.picture, dpi=110)
