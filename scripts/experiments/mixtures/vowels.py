"""Vowels of many speakers: table 1 of Jacobs et al. (1991), Neural Computation 3, pages 79 to 87.

docs/results/mixtures.md describes the task, and says which settings are the paper's and which ours.
A pass has one step of gradient descent, or one E- and one M-step.

Gradient descent is as in the paper: small systems, one step a pass, no momentum. A system has
parameters, a gradient and an output. All its inputs have a last column of ones.
"""

from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import numpy as np
from scipy.special import expit, log_softmax, softmax

from scripts.experiments.mixtures.data import read_vowels
from scripts.experiments.mixtures.quiet import fit_quietly
from vmoe.classic import MixtureOfExpertsClassifier

VOWELS = ("iy", "ih", "aa", "ah")  # heed, hid, hod, hud
FIRST = ("iy", "aa")  # the vowels of output 1
TRAINED, TESTED = 50, 25  # speakers
CRITERION = 0.08
"""A run ends when the mean squared error of the outputs is below this."""
START = 0.5
"""Parameters start uniformly between -0.5 and 0.5."""
Parameters = tuple[np.ndarray, np.ndarray]
STEPS = tuple(2.0**n for n in range(1, 11))
"""Sizes of steps that are tried."""


class System(Protocol):
    """A model with one output."""

    def start(self, inputs: int, rng: np.random.Generator) -> Parameters: ...

    def output(self, parameters: Parameters, x: np.ndarray) -> np.ndarray: ...

    def gradient(self, parameters: Parameters, x: np.ndarray, y: np.ndarray) -> Parameters:
        """The gradient of the mean error over the rows."""


class Mixture(NamedTuple):
    """Logistic experts, a softmax gate; the error is equation 1.3, -log sum g exp(-(y - o)² / 2).

    Attributes:
        experts: their number k. The parameters are the gate's and the experts', (k, inputs).
    """

    experts: int

    def start(self, inputs: int, rng: np.random.Generator) -> Parameters:
        gate, experts = rng.uniform(-START, START, (2, self.experts, inputs))
        return gate, experts

    def output(self, parameters: Parameters, x: np.ndarray) -> np.ndarray:
        gate, experts = parameters
        return (softmax(x @ gate.T, axis=1) * expit(x @ experts.T)).sum(1)

    def gradient(self, parameters: Parameters, x: np.ndarray, y: np.ndarray) -> Parameters:
        gate, experts = parameters
        log_gates, outputs = log_softmax(x @ gate.T, axis=1), expit(x @ experts.T)
        errors = y[:, None] - outputs
        responsibilities = softmax(log_gates - errors**2 / 2, axis=1)
        of_gate = (np.exp(log_gates) - responsibilities).T @ x
        back = -responsibilities * errors * outputs * (1 - outputs)
        return of_gate / len(x), back.T @ x / len(x)


class Network(NamedTuple):
    """A layer of logistic units and a logistic output; the error is (y - o)² / 2.

    Attributes:
        hidden: the number of units h. The parameters are (h, inputs), and (h + 1,) of the output.
    """

    hidden: int

    def start(self, inputs: int, rng: np.random.Generator) -> Parameters:
        return (
            rng.uniform(-START, START, (self.hidden, inputs)),
            rng.uniform(-START, START, self.hidden + 1),
        )

    def output(self, parameters: Parameters, x: np.ndarray) -> np.ndarray:
        first, last = parameters
        return expit(expit(x @ first.T) @ last[:-1] + last[-1])

    def gradient(self, parameters: Parameters, x: np.ndarray, y: np.ndarray) -> Parameters:
        first, last = parameters
        units = expit(x @ first.T)
        output = expit(units @ last[:-1] + last[-1])
        back = (output - y) * output * (1 - output)
        of_units = back[:, None] * last[:-1] * units * (1 - units)
        of_last = np.append(back @ units, back.sum())
        return of_units.T @ x / len(x), of_last / len(x)


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


def descend(
    system: System,
    start: Parameters,
    x: np.ndarray,
    y: np.ndarray,
    *,
    step: float,
    passes: int,
    reached: Callable[[np.ndarray], bool],
) -> tuple[Parameters, int | None]:
    """Takes steps down the gradient until the outputs on the training rows are good enough.

    Args:
        x, y: rows (n, inputs) and targets (n,).
        step: multiplies the gradient of the mean error.
        passes: the largest number of steps.
        reached: whether the outputs (n,) are good enough.

    Returns:
        The parameters and the number of passes; None if the outputs are not good enough.
    """
    parameters = start
    for number in range(passes + 1):
        if reached(system.output(parameters, x)):
            return parameters, number
        slopes = system.gradient(parameters, x, y)
        first, second = (own - step * slope for own, slope in zip(parameters, slopes, strict=True))
        parameters = first, second
    return parameters, None
