"""The hard tree of a mixture: every row goes to the most probable child of every gate.

A gate with infinitely large coefficients is such a split, which is the tie to decision trees.
"""

import copy
from typing import Any

import numpy as np
from sklearn.metrics import r2_score

from vmoe.classic.tree import hard_route


class HardTree:
    """A decision tree with the splits and the experts of a mixture.

    Attributes:
        mixture: a copy of the fitted estimator, which later changes leave as it is.
    """

    def __init__(self, mixture: Any):
        self.mixture = copy.copy(mixture)  # later fits make new parts and change no old ones

    def apply(self, X: Any) -> np.ndarray:
        """The expert that each row reaches (n,)."""
        return hard_route(self.mixture._mixture.tree, self.mixture._rows(X))

    def predict(self, X: Any) -> np.ndarray:
        """The mean, or the most probable class, of the expert that each row reaches."""
        means = self.mixture._mixture.experts.means(self.mixture._rows(X))
        return self.mixture._decide(means[np.arange(len(means)), self.apply(X)])

    def agreement(self, X: Any) -> float:
        """How well the hard tree repeats the mixture's predictions; 1 is the same.

        The fraction of rows with the same class; for a regression, R^2 with the mixture's
        predictions as the truth.
        """
        soft, hard = self.mixture.predict(X), self.predict(X)
        if hasattr(self.mixture, "classes_"):
            return float(np.mean(soft == hard))
        return float(r2_score(soft, hard))
