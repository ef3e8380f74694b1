"""Newton's method with step halving, for the concave functions of an M-step.

The curvature and its factor cost most, so they are kept as long as steps shrink fast, also from one
M-step to the next. They decide how many steps it takes, but not where the gradient is zero.
"""

from typing import Any, NamedTuple, Protocol, runtime_checkable

import numpy as np
from jaxtyping import Float

from vmoe.classic.grams import Solver, by_cholesky, by_eigenvectors

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


class Newton:
    """Newton's method for functions that change little from one to the next, as those of EM do.

    It keeps the last factor of a curvature. A copy starts without one, as does a pickled one.
    """

    def __init__(self) -> None:
        self._kept: Solver | None = None

    def __reduce__(self) -> tuple[type["Newton"], tuple[()]]:
        return Newton, ()

    def maximize(
        self, function: Concave, coef: Float[np.ndarray, "..."]
    ) -> Float[np.ndarray, "..."]:
        """The coefficients at the maximum, from a start; the value never falls.

        Without a maximum, as for a logistic model of separable classes without a penalty, it stops
        after ``MAX_STEPS``.
        """
        value, state = function.evaluate(coef)
        last = np.inf
        for _ in range(MAX_STEPS):
            gradient = function.gradient(coef, state)
            least = value - ROUNDING * abs(value)
            found = self._kept_step(function, coef, gradient, least, FAST * last)
            if found is None:
                step = self._factored(function.curvature(state))(gradient)
                found = _halved(function, coef, step, least)
            if found is None:
                return coef
            before, (coef, value, state, step) = coef, found
            last = np.abs(step).max()
            # Of a step that is halved until rounding decides, nothing is left to gain.
            small = np.abs(coef - before).max() <= SMALL * max(1.0, np.abs(coef).max())
            if small or gradient @ step <= NO_GAIN * function.total_mass:
                return coef
        return coef

    def _factored(self, curvature: np.ndarray) -> Solver:
        """Keeps a factor, unless the curvature is singular and the next one may not be."""
        self._kept = by_cholesky(curvature)
        return self._kept or by_eigenvectors(curvature)

    def _kept_step(
        self,
        function: Concave,
        coef: np.ndarray,
        gradient: np.ndarray,
        least: float,
        longest: float,
    ) -> "Reached | None":
        """The step by the kept factor; None if it is long or too long."""
        if self._kept is None:
            return None
        step = self._kept(gradient)
        if np.abs(step).max() > longest:
            return None
        return _halved(function, coef, step, least, 1)


class Reached(NamedTuple):
    """Where a step leads: the coefficients, the value and its state there, and the whole step."""

    coef: np.ndarray
    value: float
    state: Any
    step: np.ndarray


def _halved(
    function: Concave, coef: np.ndarray, step: np.ndarray, least: float, tries: int = HALVINGS
) -> Reached | None:
    """The first of ever smaller steps that reaches a value; None if none does."""
    for halving in range(tries):
        moved = function.moved(coef, step * 0.5**halving)
        value, state = function.evaluate(moved)
        if value >= least:
            return Reached(moved, value, state, step)
    return None
