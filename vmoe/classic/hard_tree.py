"""The hard tree of a mixture: every row goes to the most probable child of every gate.

A gate with infinitely large coefficients is such a split, which is the tie to decision trees.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
from sklearn.metrics import r2_score

from vmoe.classic.mixture import Mixture
from vmoe.classic.rows import Rows
from vmoe.classic.tree import hard_route


@dataclass(frozen=True, eq=False, repr=False)
class HardTree:
    """A decision tree with the splits and the experts of a mixture.

    Attributes:
        mixture: a copy of the fitted estimator, which later changes leave as it is.
        fitted: its gates and experts.
        rows: makes rows of X.
        decide: predictions in the form of y, from means or probabilities.
    """

    mixture: Any
    fitted: Mixture
    rows: Callable[[Any], Rows]
    decide: Callable[[np.ndarray], np.ndarray]

    def apply(self, X: Any) -> np.ndarray:
        """The expert that each row reaches (n,)."""
        return hard_route(self.fitted.tree, self.rows(X))

    def predict(self, X: Any) -> np.ndarray:
        """The mean, or the most probable class, of the expert that each row reaches."""
        means = self.fitted.experts.means(self.rows(X))
        return self.decide(means[np.arange(len(means)), self.apply(X)])

    def agreement(self, X: Any) -> float:
        """How well the hard tree repeats the mixture's predictions; 1 is the same.

        The fraction of rows with the same class; for a regression, R^2 with the mixture's
        predictions as the truth.
        """
        soft, hard = self.mixture.predict(X), self.predict(X)
        if hasattr(self.mixture, "classes_"):
            return float(np.mean(soft == hard))
        return float(r2_score(soft, hard))
