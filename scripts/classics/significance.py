"""Two tests of whether one classifier errs less than another on data of the same kind.

Dietterich (Neural Computation 10, 1998) compares five such tests. These are two of them, the first
as Alpaydin combined it (Neural Computation 11, 1999).
"""

import numpy as np
from scipy.stats import binomtest, f

REPETITIONS, FOLDS = 5, 2


def combined_f(differences: np.ndarray) -> tuple[float, float]:
    """The combined 5x2cv F test.

    Args:
        differences: the error of one model minus that of another, (5, 2): in each of five
            repetitions the rows are halved at random, and each half is the test set once.

    Returns:
        The statistic, about F(10, 5) if the models err equally, and its p-value. If nothing varies,
        the p-value is 1 without a difference, and otherwise 0.
    """
    variances = ((differences - differences.mean(1, keepdims=True)) ** 2).sum(1)
    squares = (differences**2).sum()
    if not squares:
        return 0.0, 1.0
    with np.errstate(divide="ignore"):
        statistic = squares / (2 * variances.sum())
    return float(statistic), float(f.sf(statistic, REPETITIONS * FOLDS, REPETITIONS))


def mcnemar(first_alone: int, second_alone: int) -> float:
    """McNemar's exact test on one test set.

    Args:
        first_alone: rows that the first model alone predicts correctly.
        second_alone: rows that the second model alone predicts correctly.

    Returns:
        The p-value: how likely fair coins would split these rows at least as unevenly.
    """
    discordant = first_alone + second_alone
    return float(binomtest(first_alone, discordant).pvalue) if discordant else 1.0
