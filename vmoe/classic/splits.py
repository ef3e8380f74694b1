"""The splits of a mixture: where each gate looks, and how sure it is."""

from dataclasses import dataclass
from typing import Any

import numpy as np
from scipy.special import entr

from vmoe.classic.mixture import Mixture
from vmoe.classic.multinomial import curvature
from vmoe.classic.rows import Rows
from vmoe.classic.tree import TreeGate


@dataclass(frozen=True)
class Split:
    """One gate.

    Attributes:
        depth: 0 for the root.
        direction: unit vectors (k, d) in standardized columns, along which the logit of each child
            rises fastest, compared with the mean of the children. Zeros for a gate without slopes.
        probabilities: the probability of every child for a row at the gate (n, k).
        reach: the probability that each row reaches the gate (n,).
        entropy: how unsure the gate is about each row: the entropy of its probabilities in nats
            (n,), from 0 to log k.
        covariance: Laplace's approximation (c, c) with c = (k - 1) p for the coefficients of all
            children but the first, for columns as they were given: the inverse curvature of the
            gate's log-likelihood, in which a row counts with its weight times its reach.
    """

    depth: int
    direction: np.ndarray
    probabilities: np.ndarray
    reach: np.ndarray
    entropy: np.ndarray
    covariance: np.ndarray


def splits(mixture: Mixture, rows: Rows) -> list[Split]:
    """Every gate, level by level.

    Args:
        rows: weighted rows to measure entropy and covariance with; their targets are not needed.
    """
    found, level = [], [(mixture.tree, np.ones(len(rows)), 0)]
    for gate, reach, depth in level:
        p = np.exp(gate.log_probabilities(rows))
        covariance = _covariance(gate, rows, p, reach, mixture.gate_penalty)
        entropy = entr(p).sum(axis=1)
        found.append(Split(depth, direction(gate), p, reach, entropy, covariance))
        for k, child in enumerate(gate.children):
            if isinstance(child, TreeGate):
                level.append((child, reach * p[:, k], depth + 1))
    return found


def direction(gate: TreeGate) -> Any:
    """The unit vectors of ``Split.direction``."""
    slopes = gate.coef[:, 1:] - gate.coef[:, 1:].mean(axis=0)
    length = np.linalg.norm(slopes, axis=1, keepdims=True)
    return np.divide(slopes, length, out=np.zeros_like(slopes), where=length > 0)


def _covariance(
    gate: TreeGate, rows: Rows, p: np.ndarray, reach: np.ndarray, penalty: float
) -> np.ndarray:
    curved = curvature(rows.gate, p.T, reach * rows.weight, penalty)
    inverse = np.linalg.pinv(curved, hermitian=True)
    to_given = rows.view.gate_design.to_given(np.eye(gate.coef.shape[1]))
    change = np.kron(np.eye(len(gate.coef) - 1), to_given)
    return change.T @ inverse @ change
