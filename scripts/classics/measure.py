"""The experiments by name."""

from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any, NamedTuple

from figures import Experiment

from classics import lines, methods, stored, trees, vowels
from classics.data import checksum


class Size(NamedTuple):
    """How large the experiments are.

    Attributes:
        passes: largest number of passes through the vowels.
        starts: number of starts of EM on tone perception and nitrogen oxides.
        steps: largest number of EM steps on these and against R.
        share: fraction of the arm's rows.
        settings: how many settings each method tries on the arm; None for all.
        rows: how many rows, or speakers, a data set of the trees has; None for all.
        classifiers: sizes for ``trees.make``.
    """

    passes: int
    starts: int
    steps: int
    share: float
    settings: int | None
    rows: int | None
    classifiers: dict[str, Any]


SIZES = {
    "full": Size(
        passes=4_000,
        starts=20,
        steps=3_000,
        share=1.0,
        settings=None,
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
        rows=60,
        classifiers={"branchings": [(2,)], "steps": 1, "trees": 3, "rounds": 3, "folds": 0},
    ),
}


def _experiment(
    seeds: int, tables: Iterable[str], figures: Callable[[Path, int, Size], dict[str, Any]]
) -> Experiment:
    """An experiment.

    Args:
        tables: names of the tables that it reads.
        figures: its function; the arguments are the folder of the tables, a seed and a size.
    """
    return Experiment(
        seeds,
        lambda options, seed: figures(options.data, seed, SIZES[options.size]),
        lambda options: {name: checksum(options.data, name) for name in tables},
    )


def _arm(name: str) -> Experiment:
    return _experiment(
        5, (), lambda _, seed, size: methods.measure(name, seed, size.share, size.settings)
    )


def _lines(name: str) -> Experiment:
    return _experiment(
        1, (name,), lambda folder, _, size: lines.measure(folder, name, size.starts, size.steps)
    )


def _trees(name: str) -> Experiment:
    tables = () if name in trees.SKLEARN else (name,)
    return _experiment(
        1,
        tables,
        lambda folder, _, size: trees.measure(name, folder, size.rows, size.classifiers),
    )


EXPERIMENTS = {
    "vowels": _experiment(
        25, ("vowels",), lambda folder, seed, size: vowels.measure(folder, seed, size.passes)
    ),
    **{f"arm_{name}": _arm(name) for name in methods.METHODS},
    **{name: _lines(name) for name in lines.COLUMNS},
    "stored": _experiment(
        1, ("npreg", "no", "tone"), lambda folder, _, size: stored.measure(folder, size.steps)
    ),
    **{f"trees_{name}": _trees(name) for name in trees.LABELS},
}
