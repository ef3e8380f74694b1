"""The experiments by name, and one row of each."""

import platform
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import scipy
import sklearn

from classics import lines, methods, stored, trees, vowels


class Size(NamedTuple):
    """How large the experiments are.

    Attributes:
        passes: of gradient descent on the vowels, at most.
        starts: of EM on tone perception and nitrogen oxides.
        steps: of EM on these, and against R, at most.
        share: of the arm's rows.
        settings: of each method on the arm that are tried; None for all.
        rows: of the data sets of the trees, or speakers; None for all.
        classifiers: the sizes of ``trees.make``.
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


class Experiment(NamedTuple):
    """What makes a row.

    Attributes:
        seeds: the number of rows.
        tables: of the data that it reads.
        figures: the function of the folder of the data, a seed and a size.
    """

    seeds: int
    tables: tuple[str, ...]
    figures: Callable[[Path, int, Size], dict[str, Any]]


def _arm(name: str) -> Experiment:
    return Experiment(
        5, (), lambda _, seed, size: methods.measure(name, seed, size.share, size.settings)
    )


def _lines(name: str) -> Experiment:
    return Experiment(
        1, (name,), lambda folder, _, size: lines.measure(folder, name, size.starts, size.steps)
    )


def _trees(name: str) -> Experiment:
    tables = () if name in trees.SKLEARN else (name,)
    return Experiment(
        1,
        tables,
        lambda folder, _, size: trees.measure(name, folder, size.rows, size.classifiers),
    )


EXPERIMENTS = {
    "vowels": Experiment(
        25, ("vowels",), lambda folder, seed, size: vowels.measure(folder, seed, size.passes)
    ),
    **{f"arm_{name}": _arm(name) for name in methods.METHODS},
    **{name: _lines(name) for name in lines.COLUMNS},
    "stored": Experiment(
        1, ("npreg", "no", "tone"), lambda folder, _, size: stored.measure(folder, size.steps)
    ),
    **{f"trees_{name}": _trees(name) for name in trees.LABELS},
}


def measure(name: str, seed: int, folder: Path, size: str) -> dict[str, Any]:
    """The figures of a row, the seconds of one core that they took, and the versions."""
    start = time.process_time()
    figures = EXPERIMENTS[name].figures(folder, seed, SIZES[size])
    return {
        "seconds": round(time.process_time() - start, 1),
        "versions": {
            "python": platform.python_version(),
            **{each.__name__: each.__version__ for each in (np, scipy, sklearn)},
        },
        "figures": figures,
    }
