"""The predictive distribution of a regression: a mixture, so that two-valued relations show.

A mean can lie where no target ever is; the quantiles and samples of the mixture do not.
"""

from dataclasses import dataclass
from functools import cached_property
from numbers import Integral
from typing import Any

import numpy as np
from jaxtyping import Float
from scipy.special import logsumexp
from sklearn.utils import check_random_state

BISECTIONS = 60  # halve the bracket of a quantile to rounding


@dataclass(frozen=True)
class PredictiveDistribution:
    """The distribution of y for every row.

    Attributes:
        log_gates: the logarithm of the prior probability of every expert (n, e).
        parts: pairs of experts' indices and their distributions, of scipy.stats, (n, m, q).
        single: whether y has one output and no axis for it.
        discrete: whether y takes whole numbers only.
    """

    log_gates: Float[np.ndarray, "n e"]
    parts: list[tuple[np.ndarray, Any]]
    single: bool
    discrete: bool

    @cached_property
    def gates(self) -> Float[np.ndarray, "n e"]:
        """The prior probability of every expert."""
        return np.exp(self.log_gates)

    def mean(self) -> np.ndarray:
        """The mean: (n,), or (n, q) if y was a matrix."""
        return self._form(self._average("mean"))

    def std(self) -> np.ndarray:
        """The standard deviation: what the experts' noise and their differences make together."""
        means = self._each("mean")
        spread = means - self._average("mean")[:, None]
        return self._form(np.sqrt(self._weighted(self._each("var") + spread**2)))

    def logpdf(self, y: Any) -> Float[np.ndarray, "n"]:
        """The logarithm of the density at y; for counts, of the probability of y.

        Several outputs have one joint density: given the expert they are independent, but the
        expert is common to them, so that it is not the product of each output's own.

        Args:
            y: one number, or a target for every row in the form of y.
        """
        targets = self._targets(y)[:, None]
        each = [
            frozen.logpmf(targets) if hasattr(frozen, "logpmf") else frozen.logpdf(targets)
            for _, frozen in self.parts
        ]
        return logsumexp(self.log_gates + self._joined(each).sum(axis=2), axis=1)

    def pdf(self, y: Any) -> Float[np.ndarray, "n"]:
        """The density at y, as for ``logpdf``."""
        return np.exp(self.logpdf(y))

    def cdf(self, y: Any) -> np.ndarray:
        """The probability of at most y, for each output alone: (n,) or (n, q).

        Args:
            y: one number, or a target for every row in the form of y.
        """
        return self._form(self._cdf(self._targets(y)))

    def quantile(self, probability: Any) -> np.ndarray:
        """Quantiles: (n,) or (n, q) for one probability, with an axis in front for several.

        Args:
            probability: in (0, 1).

        Raises:
            ValueError: a probability is not in (0, 1).
        """
        levels = np.asarray(probability, float)
        if not np.all((levels > 0) & (levels < 1)):
            raise ValueError(f"probability={probability!r}: should be in (0, 1)")
        found = [self._form(self._quantile(level)) for level in levels.ravel()]
        return np.reshape(found, (*levels.shape, *found[0].shape))

    def sample(self, n_samples: Any = 1, random_state: Any = None) -> np.ndarray:
        """Draws an expert for every row, and then y: (n_samples, n) or (n_samples, n, q).

        Raises:
            ValueError: ``n_samples`` is not an integer above 0.
        """
        if not (isinstance(n_samples, Integral) and int(n_samples) >= 1):
            raise ValueError(f"n_samples={n_samples!r}: should be an integer of at least 1")
        random = check_random_state(random_state)
        reached = np.cumsum(self.gates, axis=1)[:, :-1]
        drawn = []
        for _ in range(int(n_samples)):
            expert = (random.random_sample((len(reached), 1)) > reached).sum(axis=1)
            every = self._joined(
                [
                    frozen.rvs(size=frozen.mean().shape, random_state=random)
                    for _, frozen in self.parts
                ]
            )
            drawn.append(self._form(every[np.arange(len(expert)), expert]))
        return np.stack(drawn)

    def _targets(self, y: Any) -> Float[np.ndarray, "n q"]:
        values = np.asarray(y, float)
        if self.single and values.ndim == 1:
            values = values[:, None]
        shape = self._each("mean").shape
        return np.broadcast_to(values, (shape[0], shape[2]))

    def _quantile(self, level: float) -> Float[np.ndarray, "n q"]:
        """By bisection: the mixture's quantile is between the least and largest of its parts."""
        each = self._joined([frozen.ppf(level) for _, frozen in self.parts])
        low, high = each.min(axis=1) - 1e-9, each.max(axis=1)
        for _ in range(BISECTIONS):
            middle = (low + high) / 2
            enough = self._cdf(middle) >= level
            low, high = np.where(enough, low, middle), np.where(enough, middle, high)
        return np.round(high) if self.discrete else high

    def _cdf(self, y: Float[np.ndarray, "n q"]) -> Float[np.ndarray, "n q"]:
        return self._weighted(self._joined([frozen.cdf(y[:, None]) for _, frozen in self.parts]))

    def _average(self, moment: str) -> Float[np.ndarray, "n q"]:
        return self._weighted(self._each(moment))

    def _each(self, moment: str) -> Float[np.ndarray, "n e q"]:
        return self._joined([getattr(frozen, moment)() for _, frozen in self.parts])

    def _joined(self, values: list[np.ndarray]) -> Float[np.ndarray, "n e q"]:
        """Values of the parts, in the experts' order."""
        order = np.argsort(np.concatenate([experts for experts, _ in self.parts]))
        return np.concatenate(values, axis=1)[:, order].astype(float)

    def _weighted(self, values: Float[np.ndarray, "n e q"]) -> Float[np.ndarray, "n q"]:
        return np.einsum("ne,neq->nq", self.gates, values)

    def _form(self, values: Float[np.ndarray, "n q"]) -> np.ndarray:
        return values[:, 0] if self.single else values
