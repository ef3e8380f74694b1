"""Newton's method with step halving, for the concave functions of an M-step."""

from typing import Any, Protocol, runtime_checkable

import numpy as np
from jaxtyping import Float

from vmoe.classic.grams import solve

MAX_STEPS = 50
HALVINGS = 40
SMALL = 1e-6  # steps converge quadratically, so the error after one of this size is rounding
NO_GAIN = 1e-15  # Newton's estimate of what is left to gain, per unit of mass
ROUNDING = 1e-13  # the part of a value by which it may fall only because of rounding


@runtime_checkable
class Concave(Protocol):
    """A concave function of coefficients."""

    @property
    def total_mass(self) -> float:
        """The sum of the rows' masses, the scale of the function."""
        ...

    def evaluate(self, coef: np.ndarray) -> tuple[float, Any]:
        """The value, and what ``derivatives`` can reuse."""
        ...

    def derivatives(self, coef: np.ndarray, state: Any, /) -> tuple[np.ndarray, np.ndarray]:
        """The gradient, as a vector, and the negative Hessian."""
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
    for _ in range(MAX_STEPS):
        gradient, curvature = function.derivatives(coef, state)
        step = solve(curvature, gradient)
        least = value - ROUNDING * abs(value)
        for halving in range(HALVINGS):
            moved = function.moved(coef, step * 0.5**halving)
            new, new_state = function.evaluate(moved)
            if new >= least:
                break
        else:
            return coef
        coef, value, state = moved, new, new_state
        if gradient @ step <= NO_GAIN * function.total_mass:
            return coef
        if np.abs(step).max(initial=0) <= SMALL * max(1.0, np.abs(coef).max(initial=0)):
            return coef
    return coef
