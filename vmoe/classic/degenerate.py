"""Experts that a mixture has for nothing: copies of others, experts without rows or without noise.

EM moves experts that start alike in the same way, so they stay copies of one another. An expert
without noise fits a few rows exactly, and the likelihood then depends on the bound on its variance.
"""

import itertools
from dataclasses import dataclass

import numpy as np
from jaxtyping import Float

from vmoe.classic.mixture import Mixture
from vmoe.classic.rows import Rows

SAME = 1e-6  # the largest difference of logarithms between copies


@dataclass(frozen=True)
class DegenerateExperts:
    """The experts, by their indices, that should make a user think.

    Attributes:
        copies: experts with the same density as an earlier one for every row.
        empty: experts whose load, the sum of their responsibilities, is less than a row.
        at_floor: experts that have the least variance that ``variance_floor`` allows.
    """

    copies: list[int]
    empty: list[int]
    at_floor: list[int]

    def messages(self) -> list[str]:
        """What there is to say about them, a line for each kind, with a remedy."""
        found = []
        if self.copies:
            found.append(
                f"experts {self.copies} are copies of others: use fewer experts or another start"
            )
        if self.empty:
            found.append(f"experts {self.empty} have less than one row: use fewer experts")
        if self.at_floor:
            found.append(
                f"experts {self.at_floor} have the least variance, on which the likelihood then "
                "depends: use fewer experts or a larger variance_floor"
            )
        return found


def degenerate_experts(mixture: Mixture, rows: Rows) -> DegenerateExperts:
    """The degenerate experts of a fitted mixture, given its rows."""
    return DegenerateExperts(
        copies=_copies(mixture, rows),
        empty=empty_experts(mixture, rows),
        at_floor=np.flatnonzero(mixture.experts.at_floor().any(axis=1)).tolist(),
    )


def empty_experts(mixture: Mixture, rows: Rows) -> list[int]:
    """The experts whose load is less than a row, or than a row's mean weight if that is less."""
    posterior, _ = mixture.posterior(rows)
    row = min(1.0, float(rows.weight[rows.weight > 0].mean()))
    return np.flatnonzero(rows.weight @ posterior < row).tolist()


def _copies(mixture: Mixture, rows: Rows) -> list[int]:
    density = mixture.experts.log_density(rows)[rows.weight > 0]
    pairs = itertools.combinations(range(density.shape[1]), 2)
    # few rows tell most pairs apart
    return sorted({j for i, j in pairs if _equal(density[:9], i, j) and _equal(density, i, j)})


def _equal(density: Float[np.ndarray, "n e"], first: int, second: int) -> bool:
    with np.errstate(invalid="ignore"):  # -inf minus -inf, which makes no copy
        return bool((np.abs(density[:, first] - density[:, second]) < SAME).all())
