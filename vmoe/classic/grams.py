"""Weighted Gram matrices of many weightings at once, which is where EM spends its time."""

from collections.abc import Callable

import numpy as np
from jaxtyping import Float
from scipy.linalg import get_lapack_funcs

WIDE = 4  # with at least so many columns per weighting, one product per weighting is faster
ROWS = 512  # in a block of such a product
BLOCK = 2**17  # numbers in a block of products of columns; blocks stay in the processor's cache
REGULAR = 1e-10  # the least reciprocal condition number for a Cholesky factor
POTRF, POCON, POTRS = get_lapack_funcs(("potrf", "pocon", "potrs"), dtype=np.float64)
"""LAPACK's Cholesky factor, the reciprocal condition number by it, and the solution by it."""

Solver = Callable[[np.ndarray], np.ndarray]
"""Solutions of one system for one vector or, as columns, several."""


def weighted_grams(
    x: Float[np.ndarray, "n p"], weights: Float[np.ndarray, "m n"]
) -> Float[np.ndarray, "m p p"]:
    """X^T diag(w) X for every row w of ``weights``.

    With many weightings of few columns, the products of all pairs of columns are formed once for a
    block of rows; one matrix product with the weights then has all Gram matrices.

    >>> weighted_grams(np.array([[1.0, 2.0]]), np.array([[10.0]]))
    array([[[10., 20.],
            [20., 40.]]])
    """
    p = x.shape[1]
    grams = np.zeros((len(weights), p, p))
    if len(weights) <= p // WIDE:
        for start in range(0, len(x), ROWS):
            part = x[start : start + ROWS]
            for gram, w in zip(grams, weights[:, start : start + ROWS], strict=True):
                gram += (part * w[:, None]).T @ part
        return grams
    above = np.triu_indices(p)
    grams[:, *above] = _upper(x, weights)
    grams[:, *above[::-1]] = grams[:, *above]
    return grams


def _upper(x: np.ndarray, weights: np.ndarray) -> np.ndarray:
    """The upper triangles, row by row: (m, p * (p + 1) / 2)."""
    p = x.shape[1]
    pairs = p * (p + 1) // 2
    rows = max(64, BLOCK // pairs)
    products, total = np.empty((pairs, rows)), np.zeros((len(weights), pairs))
    for start in range(0, len(x), rows):
        columns = np.ascontiguousarray(x[start : start + rows].T)
        end, size = 0, columns.shape[1]
        for i in range(p):
            begin, end = end, end + p - i
            np.multiply(columns[i], columns[i:], out=products[begin:end, :size])
        total += weights[:, start : start + rows] @ products[:, :size].T
    return total


def slopes_only(p: int) -> Float[np.ndarray, "p p"]:
    """The diagonal matrix with a one for every coefficient but the intercept."""
    return np.diag(np.r_[0.0, np.ones(p - 1)])


def solve(
    matrix: Float[np.ndarray, "p p"], vectors: Float[np.ndarray, "p *q"]
) -> Float[np.ndarray, "p *q"]:
    """Solves a symmetric system without negative eigenvalues, also for several vectors.

    A singular system has the shortest solution.
    """
    solver = by_cholesky(matrix) or by_eigenvectors(matrix)
    return solver(vectors)


def by_cholesky(matrix: Float[np.ndarray, "p p"]) -> Solver | None:
    """Solutions by Cholesky's factor, which takes a tenth of the time of all eigenvectors.

    None if the matrix is singular, or almost.
    """
    factor, failed = POTRF(matrix)
    if failed or POCON(factor, np.abs(matrix).sum(axis=0).max())[0] <= REGULAR:
        return None
    return lambda vectors: POTRS(factor, vectors)[0]


def by_eigenvectors(matrix: Float[np.ndarray, "p p"]) -> Solver:
    """Solutions by the pseudoinverse."""
    values, vectors = np.linalg.eigh(matrix)
    some = values > values[-1] * len(values) * np.finfo(float).eps
    inverse, across = 1 / values[some], vectors[:, some]
    return lambda right: (across * inverse) @ (across.T @ right)
