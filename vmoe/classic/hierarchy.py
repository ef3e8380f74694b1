"""Hierarchical mixtures of experts: a tree of gates (Jordan & Jacobs 1994), fitted by EM."""

import math
from typing import Any, ClassVar

import numpy as np
from sklearn.utils._param_validation import StrOptions

from vmoe.classic import em
from vmoe.classic.estimator import AT_LEAST_1, MixtureEstimator
from vmoe.classic.growth import grow_to
from vmoe.classic.mixture import Mixture
from vmoe.classic.rows import Rows
from vmoe.classic.tasks import Classification, Regression
from vmoe.classic.tree import Gate, grow


class HierarchicalMixture(MixtureEstimator):
    """A mixture with a tree of gates."""

    _parameter_constraints: ClassVar[dict[str, Any]] = {
        **MixtureEstimator._parameter_constraints,
        "branching": ["array-like"],
        "growth": [AT_LEAST_1, None],
    }

    def __init__(
        self,
        branching: Any = (2, 2),
        *,
        growth: int | None = None,
        experts: Any = None,
        gate_features: Any = None,
        expert_features: Any = None,
        gate_penalty: float = 0.01,
        expert_penalty: float = 0.01,
        variance_floor: float = 1e-4,
        start: Any = "principal",
        n_init: int = 1,
        tol: float = 1e-5,
        stopping: str = "relative",
        max_iter: int = 100,
        solver: str = "em",
        combine: str = "weighted",
        random_state: Any = None,
        warm_start: bool = False,
        decay: float = 0.999,
    ):
        self.branching = branching
        self.growth = growth
        self.experts = experts
        self.gate_features = gate_features
        self.expert_features = expert_features
        self.gate_penalty = gate_penalty
        self.expert_penalty = expert_penalty
        self.variance_floor = variance_floor
        self.start = start
        self.n_init = n_init
        self.tol = tol
        self.stopping = stopping
        self.max_iter = max_iter
        self.solver = solver
        self.combine = combine
        self.random_state = random_state
        self.warm_start = warm_start
        self.decay = decay

    def _branching(self) -> list[int]:
        branching = np.asarray(self.branching)
        if branching.ndim != 1 or not len(branching) or branching.dtype.kind not in "iu":
            raise ValueError(f"branching={self.branching!r}: expected a list of integers")
        if branching.min() < 1:
            raise ValueError(f"branching={self.branching!r}: a gate has at least one child")
        return branching.tolist()

    def _n_leaves(self) -> int:
        return math.prod(self._branching())

    def _tree(self, n_columns: int) -> Gate:
        if self.growth is not None and self.growth < self._n_leaves():
            raise ValueError(
                f"growth={self.growth}: branching={self.branching!r} has {self._n_leaves()} experts"
            )
        return grow(self._branching(), n_columns)

    def _fit_from(self, mixture: Mixture, rows: Rows, posterior: np.ndarray | None) -> em.Fit:
        fit = super()._fit_from(mixture, rows, posterior)
        return grow_to(fit, rows, self.growth or 0, self._solve)

    def _grown_size(self) -> int:
        return max(self.growth or 0, self._n_leaves())

    @property
    def gate_coef_(self) -> list[np.ndarray]:
        """The coefficients (k, p) of every gate, level by level; the first child's are zero."""
        return self._gate_coefs()


class HierarchicalMixtureRegressor(Regression, HierarchicalMixture):
    """A regression by experts at the leaves of a tree of softmax gates, fitted by EM.

    P(y | x) = sum_i g_i(x) sum_j g_j|i(x) P_ij(y | x), and so on for deeper trees (Jordan & Jacobs
    1994). It can be read as a soft decision tree: see ``plot_tree``, ``explain``, ``splits`` and
    ``to_hard_tree``.

    Args:
        branching: the number of children of a gate at each depth: (2, 2) has two levels and four
            experts, from left to right.
        growth: number of experts to grow the tree to; None to keep the tree. The leaf whose split
            raises the log-likelihood most is split in two, and EM goes on, for at most ``max_iter``
            steps after every split; ``n_iter_`` counts all steps.

    `MixtureOfExpertsRegressor` has the other arguments. In ``start``, ``gate_coef`` is a list with
    an entry for every gate, level by level.

    Attributes:
        gate_coef_: a list of the gates' coefficients (k, p), level by level.
    """


class HierarchicalMixtureClassifier(Classification, HierarchicalMixture):
    """A classifier of experts at the leaves of a tree of softmax gates, fitted by EM.

    See `HierarchicalMixtureRegressor` for the tree, and `MixtureOfExpertsClassifier` for the other
    arguments.
    """

    _parameter_constraints: ClassVar[dict[str, Any]] = {
        **HierarchicalMixture._parameter_constraints,
        "combine": [StrOptions({"weighted", "argmax", "vote"})],
    }
