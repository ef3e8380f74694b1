"""Growing a tree: the leaf whose split raises the log-likelihood most is split, and EM continues.

The two children start apart, each fitted to its half of the leaf's rows: two copies of their parent
would give the new gate a gradient of exactly zero, so that EM could not tell them apart.
"""

import copy

import numpy as np
from jaxtyping import Float

from vmoe.classic.mixture import Mixture
from vmoe.classic.rows import Rows
from vmoe.classic.starts import first_largest, joined, principal, unsure
from vmoe.classic.tree import split_leaf


def split_worst(mixture: Mixture, rows: Rows) -> tuple[Mixture, Float[np.ndarray, "n e"]]:
    """The mixture with one more expert, and the responsibilities of its first M-step."""
    posterior, _ = mixture.posterior(rows)
    points = joined(rows)
    halves = [
        unsure(principal(points, rows.sums(rows.weight * h), 2), 2)[rows.unit] for h in posterior.T
    ]
    gains = [_gain(mixture, rows, e, posterior[:, [e]] * half) for e, half in enumerate(halves)]
    worst = first_largest(gains)
    experts = copy.copy(mixture.experts)
    experts.keep(sorted([*range(posterior.shape[1]), worst]))
    grown = Mixture(split_leaf(mixture.tree, worst), experts, mixture.gate_penalty)
    parts = [posterior[:, :worst], posterior[:, [worst]] * halves[worst], posterior[:, worst + 1 :]]
    return grown, np.concatenate(parts, axis=1)


def _gain(mixture: Mixture, rows: Rows, expert: int, parts: np.ndarray) -> float:
    """What the log-likelihood of a leaf's rows gains if its halves are fitted apart."""
    mass = parts * rows.weight[:, None]
    children = copy.copy(mixture.experts)
    children.keep([expert, expert])
    before = children.log_density(rows)
    children.update(rows, mass)
    return float(np.sum(mass * (children.log_density(rows) - before)))
