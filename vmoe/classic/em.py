"""The EM algorithm: M-steps and E-steps until the penalized log-likelihood stops rising."""

from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
from jaxtyping import Float

from vmoe.classic.mixture import Mixture
from vmoe.classic.newton import ROUNDING
from vmoe.classic.rows import Rows


@dataclass(frozen=True)
class Stopping:
    """When to stop.

    Attributes:
        max_iter: M-steps at most.
        tol: EM stops if the log-likelihood has less than this left to rise per row. A rise does
            not depend on the unit of y, as the magnitude of a log-likelihood does.
    """

    max_iter: int
    tol: float

    def reached(self, history: Sequence[float], total_weight: float) -> bool:
        """Whether to stop after these log-likelihoods."""
        return bool(aitken(history) < self.tol * total_weight)


def aitken(history: Sequence[float]) -> float:
    """How far the limit is from the last value but one, if the rises fall off geometrically.

    The limit is that of Aitken's acceleration (Boehning et al. 1994). It is compared with the last
    value but one, as McNicholas et al. 2010 do, so that what is left is at least the last rise.

    >>> aitken([0.0, 8.0, 12.0])
    8.0
    """
    if len(history) < 3:
        return np.inf
    before, last = history[-2] - history[-3], history[-1] - history[-2]
    if abs(last) <= ROUNDING * abs(history[-1]):
        return 0.0
    return abs(last / (1 - last / before)) if abs(last) < abs(before) else np.inf


@dataclass
class Fit:
    """A fitted mixture and how the fit went.

    Attributes:
        mixture: the mixture.
        history: the penalized log-likelihood after every M-step, summed over the weighted rows.
        converged: whether the rule of ``Stopping`` was met.
    """

    mixture: Mixture
    history: list[float] = field(default_factory=list)
    converged: bool = False


def run(
    mixture: Mixture,
    rows: Rows,
    posterior: Float[np.ndarray, "n e"] | None,
    stopping: Stopping,
    history: Sequence[float] = (),
) -> Fit:
    """Fits the mixture in place.

    Args:
        mixture: where to start, if there is no posterior.
        rows: the rows, with targets and weights.
        posterior: the responsibilities of the first M-step; None to start with an E-step.
        stopping: when to stop.
        history: the log-likelihoods of the steps that led to the mixture, which go on.
    """
    fit = Fit(mixture, list(history))
    if posterior is None:
        posterior, _ = mixture.posterior(rows)
    for _ in range(stopping.max_iter):
        mixture.update(rows, posterior)
        posterior, log_likelihood = mixture.posterior(rows)
        fit.history.append(float(rows.weight @ log_likelihood - mixture.penalty()))
        fit.converged = stopping.reached(fit.history, float(rows.weight.sum()))
        if fit.converged:
            break
    return fit
