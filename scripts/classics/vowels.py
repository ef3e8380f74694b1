"""Vowels of many speakers: table 1 of Jacobs et al. (1991), Neural Computation 3, pages 79 to 87.

docs/results/mixtures.md describes the task, and says which settings are the paper's and which ours.
A pass has one step of gradient descent, or one E- and one M-step.
"""

from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from classics.data import read_vowels
from classics.descent import Mixture, Network, System, descend
from classics.quiet import fit_quietly
from vmoe.classic import MixtureOfExpertsClassifier

VOWELS = ("iy", "ih", "aa", "ah")  # heed, hid, hod, hud
FIRST = ("iy", "aa")  # the vowels of output 1
TRAINED, TESTED = 50, 25  # speakers
CRITERION = 0.08
"""A run ends when the mean squared error of the outputs is below this."""
STEPS = tuple(2.0**n for n in range(1, 11))
"""Sizes of steps that are tried."""


class Em(NamedTuple):
    """A mixture that EM trains.

    Attributes:
        experts: their number.
    """

    experts: int


class Entry(NamedTuple):
    """A line of the table.

    Attributes:
        label: its name.
        system: what is trained; gradient descent trains all but ``Em``.
        published: the paper's passes and their standard deviation; None where it has none.
    """

    label: str
    system: System | Em
    published: tuple[int, int] | None = None


SYSTEMS = {
    "gradient_4": Entry("4 experts, gradient descent", Mixture(4), (1_124, 23)),
    "gradient_8": Entry("8 experts, gradient descent", Mixture(8), (1_083, 12)),
    "network_6": Entry("network of 6 hidden units", Network(6), (2_209, 83)),
    "network_12": Entry("network of 12 hidden units", Network(12), (2_435, 124)),
    "em_4": Entry("4 experts, EM", Em(4)),
    "em_8": Entry("8 experts, EM", Em(8)),
}


class Split(NamedTuple):
    """Training rows (n, 2) and test rows (m, 2) of mean 0 and variance 1, and their targets."""

    x: np.ndarray
    y: np.ndarray
    x_test: np.ndarray
    y_test: np.ndarray

    def figures(self, output: Callable[[np.ndarray], np.ndarray]) -> dict[str, float]:
        """The share of correct rows of a function from rows to outputs."""
        correct = {
            "train": (output(self.x) > 0.5) == self.y,
            "test": (output(self.x_test) > 0.5) == self.y_test,
        }
        return {name: float(each.mean()) for name, each in correct.items()}


def split(folder: Path) -> Split:
    """The vowels of 50 training and 25 test speakers, always the same."""
    table = read_vowels(folder).of(VOWELS)
    speakers = np.random.default_rng(0).permutation(np.unique(table.speakers))
    train, test = (
        np.isin(table.speakers, some)
        for some in (speakers[:TRAINED], speakers[TRAINED : TRAINED + TESTED])
    )
    x, y = table.formants[:, :2], np.isin(table.vowels, FIRST).astype(float)
    x = (x - x[train].mean(0)) / x[train].std(0)
    return Split(x[train], y[train], x[test], y[test])


def measure(folder: Path, seed: int, passes: int) -> dict[str, Any]:
    """Passes and accuracies of every system from the starts of a seed.

    Args:
        passes: at which a run ends without success.

    Returns:
        By name of the system: "passes", "train" and "test"; what gradient descent trains has these
        by size of the step.
    """
    data = split(folder)
    return {
        name: run_em(data, entry.system.experts, seed, passes)
        if isinstance(entry.system, Em)
        else {str(step): run(data, entry.system, step, seed, passes) for step in STEPS}
        for name, entry in SYSTEMS.items()
    }


def run(data: Split, system: System, step: float, seed: int, passes: int) -> dict[str, Any]:
    """One run by gradient descent; every step size has the same start."""
    start = system.start(3, np.random.default_rng(seed))
    parameters, number = descend(
        system,
        start,
        with_ones(data.x),
        data.y,
        step=step,
        passes=passes,
        reached=lambda output: good(output, data.y),
    )
    return {"passes": number} | data.figures(lambda x: system.output(parameters, with_ones(x)))


def run_em(data: Split, experts: int, seed: int, passes: int) -> dict[str, Any]:
    """One run by EM, one pass at a time."""
    model = MixtureOfExpertsClassifier(
        experts, start="random", random_state=seed, max_iter=1, warm_start=True
    )
    number = None
    for i in range(1, passes + 1):
        fit_quietly(model, data.x, data.y)
        if good(model.predict_proba(data.x)[:, 1], data.y):
            number = i
            break
    return {"passes": number} | data.figures(lambda x: model.predict_proba(x)[:, 1])


def good(output: np.ndarray, y: np.ndarray) -> bool:
    return bool(np.mean((output - y) ** 2) < CRITERION)


def with_ones(x: np.ndarray) -> np.ndarray:
    return np.column_stack([x, np.ones(len(x))])
