"""Tasks decomposed by hand: a fixed partition of the rows as the simplest gate.

It is not fitted: every row belongs to one expert, by groups of values of some columns (feature
groups), by the nearest of given centers in a metric, or by a function.
"""

from collections.abc import Sized
from dataclasses import dataclass
from typing import Any

import numpy as np
from jaxtyping import Float
from sklearn.base import BaseEstimator
from sklearn.metrics import pairwise_distances_argmin

from vmoe.classic.rows import Rows
from vmoe.classic.tree import TreeGate


class PartitionGate(BaseEstimator):
    """A gate that sends each row to one expert by a fixed rule: ``gate=PartitionGate(...)``.

    Exactly one of ``groups``, ``centers`` and ``rule`` is given. They see the columns of
    ``gate_features``.

    Args:
        groups: an entry for each expert with the values of the columns (m, d) that are its own; a
            row of other values goes to the expert with the nearest one.
        centers: a center for each expert (e, d); a row goes to the nearest.
        metric: the metric for groups and centers, as in scikit-learn's ``pairwise_distances``.
        rule: a function of the columns (n, d) that returns each row's expert, in [0, e).

    A fit raises a ValueError if not exactly one of them is given, or the rule is not a function.
    """

    def __init__(
        self,
        *,
        groups: Any = None,
        centers: Any = None,
        metric: str = "euclidean",
        rule: Any = None,
    ):
        self.groups, self.centers, self.metric, self.rule = groups, centers, metric, rule

    def check_experts(self, n_experts: int) -> None:
        """Raises a ValueError if there is not one rule, or for another number of experts."""
        if sum(given is not None for given in (self.groups, self.centers, self.rule)) != 1:
            raise ValueError(f"{self!r}: expected exactly one of groups, centers and rule")
        if self.rule is not None and not callable(self.rule):
            raise ValueError(f"PartitionGate: rule={self.rule!r} should be a function")
        given = self.centers if self.groups is None else self.groups
        if self.rule is None and not isinstance(given, Sized):
            raise ValueError(f"{self!r}: expected an entry for each of the {n_experts} experts")
        if given is not None and len(given) != n_experts:
            raise ValueError(f"{self!r} has {len(given)} entries, expected {n_experts}")

    def assign(self, columns: Float[np.ndarray, "n d"], n_experts: int) -> np.ndarray:
        """The expert of every row (n,)."""
        if self.rule is not None:
            experts = np.asarray(self.rule(columns))
        else:
            owners, places = self._places()
            experts = owners[pairwise_distances_argmin(columns, places, metric=self.metric)]
        if experts.shape != (len(columns),) or experts.dtype.kind not in "iub":
            raise ValueError("PartitionGate: the rule should return an integer for every row")
        if experts.min() < 0 or experts.max() >= n_experts:
            raise ValueError(f"PartitionGate: experts should be in [0, {n_experts})")
        return experts.astype(int)

    def _places(self) -> tuple[np.ndarray, np.ndarray]:
        """The places that rows are compared with, and the expert of each."""
        if self.centers is not None:
            centers = np.asarray(self.centers, float)
            return np.arange(len(centers)), centers
        groups = [np.atleast_2d(np.asarray(group, float)) for group in self.groups]
        return np.repeat(np.arange(len(groups)), [len(g) for g in groups]), np.vstack(groups)


@dataclass
class FixedGate(TreeGate):
    """A gate of a tree that follows a partition; it has no coefficients."""

    partition: PartitionGate | None = None

    def log_probabilities(self, rows: Rows) -> Float[np.ndarray, "n k"]:
        assert self.partition is not None
        k = len(self.children)
        experts = self.partition.assign(rows.gate_given, k)
        with np.errstate(divide="ignore"):
            return np.log(np.eye(k)[experts])

    def update(self, rows: Rows, mass: Float[np.ndarray, "n e"], penalty: float) -> None:
        """Nothing: the partition is fixed."""

    def n_parameters(self) -> int:
        return 0


def check_learned(gate: TreeGate) -> None:
    """Raises a ValueError for a partition, which has no coefficients to explain."""
    if isinstance(gate, FixedGate):
        raise ValueError(f"{gate.partition!r} is a rule: there are no coefficients to explain")
