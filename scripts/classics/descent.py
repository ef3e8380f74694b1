"""Gradient descent as in Jacobs et al. (1991): small systems, one step a pass, no momentum.

A system has parameters, a gradient and an output. All inputs have a last column of ones.
"""

from collections.abc import Callable
from typing import NamedTuple, Protocol

import numpy as np
from scipy.special import expit, log_softmax, softmax

START = 0.5
"""Parameters start uniformly between -0.5 and 0.5."""
Parameters = tuple[np.ndarray, np.ndarray]


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
