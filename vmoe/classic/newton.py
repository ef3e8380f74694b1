"""Newton's method with step halving, for the concave functions of an M-step.

The curvature and its factor cost most, so they are kept as long as each step is a tenth of the last
one or smaller.
"""

from typing import Any, Protocol, runtime_checkable

import numpy as np
from jaxtyping import Float

from vmoe.classic.grams import solver

MAX_STEPS = 50
HALVINGS = 40
SMALL = (
    1e-10  # the largest change of a coefficient, relative to the largest coefficient, at the end
)
NO_GAIN = 1e-20  # Newton's estimate of what is left to gain, per unit of mass, at the end
FAST = 0.1  # the curvature is kept if steps shrink to this part
ROUNDING = 1e-13  # the part of a value by which it may fall only because of rounding


@runtime_checkable
class Concave(Protocol):
    """A concave function of coefficients."""

    @property
    def total_mass(self) -> float:
        """The sum of the rows' masses, the scale of the function."""
        ...

    def evaluate(self, coef: np.ndarray) -> tuple[float, Any]:
        """The value, and what the derivatives can reuse."""
        ...

    def gradient(self, coef: np.ndarray, state: Any, /) -> np.ndarray:
        """The gradient, as a vector."""
        ...

    def curvature(self, state: Any, /) -> np.ndarray:
        """The negative Hessian."""
        ...

    def moved(self, coef: np.ndarray, step: np.ndarray) -> np.ndarray:
        """The coefficients plus a step in the form of the gradient."""
        ...


def maximize(function: Concave, coef: Float[np.ndarray, "..."]) -> Float[np.ndarray, "..."]:
    """The coefficients at the maximum, from a start; the value never falls.

    Without a maximum, as for a logistic model of separable classes without a penalty, it stops
    after ``MAX_STEPS``.
    """
    value, state = function.evaluate(coef)
    solve, last = None, 0.0
    for _ in range(MAX_STEPS):
        gradient = function.gradient(coef, state)
        step = None if solve is None else solve(gradient)
        if step is None or np.abs(step).max() > FAST * last:
            solve = solver(function.curvature(state))
            step = solve(gradient)
        least = value - ROUNDING * abs(value)
        found = _halved(function, coef, step, least)
        if found is None:
            return coef
        coef, value, state = found
        last = np.abs(step).max()
        small = last <= SMALL * max(1.0, np.abs(coef).max())
        if small or gradient @ step <= NO_GAIN * function.total_mass:
            return coef
    return coef


def _halved(
    function: Concave, coef: np.ndarray, step: np.ndarray, least: float
) -> tuple[np.ndarray, float, Any] | None:
    """The first of ever smaller steps that reaches a value; None if none does."""
    for halving in range(HALVINGS):
        moved = function.moved(coef, step * 0.5**halving)
        value, state = function.evaluate(moved)
        if value >= least:
            return moved, value, state
    return None
