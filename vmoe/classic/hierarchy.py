"""Hierarchical mixtures of experts: a tree of gates (Jordan & Jacobs 1994), fitted by EM."""

import math
from dataclasses import KW_ONLY, dataclass
from typing import Any, ClassVar

import numpy as np
from sklearn.utils._param_validation import StrOptions

from vmoe.classic.estimator import AT_LEAST_1, MixtureEstimator
from vmoe.classic.tasks import ClassificationMethods, RegressionMethods
from vmoe.classic.tree import TreeGate, grow


@dataclass(eq=False, repr=False)
class HierarchicalMixture(MixtureEstimator):
    """A mixture with a tree of gates."""

    branching: Any = (2, 2)
    _: KW_ONLY
    growth: int | None = None

    _parameter_constraints: ClassVar[dict[str, Any]] = {
        **MixtureEstimator._parameter_constraints,
        "branching": ["array-like"],
        "growth": [AT_LEAST_1, None],
    }

    _size: ClassVar[str] = "growth"

    def _least_size(self) -> int:
        return self._n_leaves()

    def _branching(self) -> list[int]:
        branching = np.asarray(self.branching)
        if branching.ndim != 1 or not len(branching) or branching.dtype.kind not in "iu":
            raise ValueError(f"branching={self.branching!r}: expected a list of integers")
        if branching.min() < 1:
            raise ValueError(f"branching={self.branching!r}: a gate has at least one child")
        return branching.tolist()

    def _n_leaves(self) -> int:
        return math.prod(self._branching())

    def _tree(self, n_columns: int) -> TreeGate:
        if self.growth is not None and self.growth < self._n_leaves():
            raise ValueError(
                f"growth={self.growth}: branching={self.branching!r} has {self._n_leaves()} experts"
            )
        return grow(self._branching(), n_columns)

    def _grown_size(self) -> int:
        return max(self.growth or 0, self._n_leaves())

    @property
    def gate_coef_(self) -> list[np.ndarray]:
        """The coefficients (k, p) of every gate, level by level; the first child's are zero."""
        return self._gate_coefs()


class HierarchicalMixtureRegressor(RegressionMethods, HierarchicalMixture):
    """A regression by experts at the leaves of a tree of softmax gates, fitted by EM.

    P(y | x) = sum_i g_i(x) sum_j g_j|i(x) P_ij(y | x), and so on for deeper trees (Jordan & Jacobs
    1994). It can be read as a soft decision tree: see ``plot_tree``, ``explain``, ``splits`` and
    ``to_hard_tree``.

    Args:
        branching: the number of children of a gate at each depth: (2, 2) has two levels and four
            experts, from left to right.
        growth: number of experts to grow the tree to; None to keep the tree. The leaf whose split
            raises the log-likelihood most is split in two, and EM continues for at most
            ``max_iter`` steps after every split; ``n_iter_`` counts all steps.

    `MixtureOfExpertsRegressor` has the other arguments. In ``start``, ``gate_coef`` is a list with
    an entry for every gate, level by level.

    Attributes:
        gate_coef_: a list of the gates' coefficients (k, p), level by level.
    """


class HierarchicalMixtureClassifier(ClassificationMethods, HierarchicalMixture):
    """A classifier of experts at the leaves of a tree of softmax gates, fitted by EM.

    See `HierarchicalMixtureRegressor` for the tree, and `MixtureOfExpertsClassifier` for the other
    arguments.
    """

    _parameter_constraints: ClassVar[dict[str, Any]] = {
        **HierarchicalMixture._parameter_constraints,
        "combine": [StrOptions({"weighted", "argmax", "vote"})],
    }
