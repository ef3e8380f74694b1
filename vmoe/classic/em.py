"""The EM algorithm: M-steps and E-steps until the penalized log-likelihood stops rising."""

from dataclasses import dataclass, field

import numpy as np
from jaxtyping import Float

from vmoe.classic.mixture import Mixture
from vmoe.classic.rows import Rows


@dataclass(frozen=True)
class Stopping:
    """When to stop.

    Attributes:
        max_iter: M-steps at most.
        tol: EM stops if the log-likelihood has less than this left to rise, relative to its
            magnitude or, if that is larger, to the sum of the weights.
        rule: "relative" takes the last rise for what is left. "aitken" takes the distance to the
            limit, which Aitken's acceleration extrapolates from the last two rises.
    """

    max_iter: int
    tol: float
    rule: str

    def reached(self, history: list[float], total_weight: float) -> bool:
        """Whether to stop after these log-likelihoods."""
        if len(history) < 2:
            return False
        ahead = abs(history[-1] - history[-2])
        if self.rule == "aitken":
            ahead = aitken(history)
        return bool(ahead < self.tol * max(abs(history[-1]), total_weight))


def aitken(history: list[float]) -> float:
    """How far the limit is from the last value, if the rises fall off geometrically.

    >>> aitken([0.0, 8.0, 12.0])
    4.0
    """
    if len(history) < 3:
        return np.inf
    before, last = history[-2] - history[-3], history[-1] - history[-2]
    if before == 0 or last == 0:
        return 0.0
    ratio = last / before
    return abs(last) * ratio / (1 - ratio) if 0 < ratio < 1 else np.inf


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
    mixture: Mixture, rows: Rows, posterior: Float[np.ndarray, "n e"] | None, stopping: Stopping
) -> Fit:
    """Fits the mixture in place.

    Args:
        mixture: where to start, if there is no posterior.
        rows: the rows, with targets and weights.
        posterior: the responsibilities of the first M-step; None to start with an E-step.
        stopping: when to stop.
    """
    fit = Fit(mixture)
    if posterior is None:
        posterior, _ = mixture.posterior(rows)
    while len(fit.history) < stopping.max_iter and not fit.converged:
        mixture.update(rows, posterior)
        posterior, log_likelihood = mixture.posterior(rows)
        fit.history.append(float(rows.weight @ log_likelihood - mixture.penalty()))
        fit.converged = stopping.reached(fit.history, float(rows.weight.sum()))
    return fit
