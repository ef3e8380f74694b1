"""The splits of a mixture: where each gate looks, and how sure it is."""

from dataclasses import dataclass
from typing import Any

import numpy as np
from jaxtyping import Float
from scipy.special import entr

from vmoe.classic.mixture import Mixture
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
        covariance: (c, c) with c = (k - 1) p for the coefficients of all children but the first,
            for columns as they were given: by the observed information of the whole log-likelihood,
            which also has what is not known of the experts.
    """

    depth: int
    direction: np.ndarray
    probabilities: np.ndarray
    reach: np.ndarray
    entropy: np.ndarray
    covariance: np.ndarray


def splits(mixture: Mixture, rows: Rows, covariance: Float[np.ndarray, "m m"]) -> list[Split]:
    """Every gate, level by level.

    Args:
        rows: rows to measure the entropy with.
        covariance: of all parameters of the mixture, the gates' first.
    """
    found, level, end = [], [(mixture.tree, np.ones(len(rows)), 0)], 0
    for gate, reach, depth in level:
        p = np.exp(gate.log_probabilities(rows))
        here = slice(end, end := end + gate.coef[1:].size)
        entropy = entr(p).sum(axis=1)
        found.append(Split(depth, direction(gate), p, reach, entropy, covariance[here, here]))
        for k, child in enumerate(gate.children):
            if isinstance(child, TreeGate):
                level.append((child, reach * p[:, k], depth + 1))
    return found


def direction(gate: TreeGate) -> Any:
    """The unit vectors of ``Split.direction``."""
    slopes = gate.coef[:, 1:] - gate.coef[:, 1:].mean(axis=0)
    length = np.linalg.norm(slopes, axis=1, keepdims=True)
    return np.divide(slopes, length, out=np.zeros_like(slopes), where=length > 0)
