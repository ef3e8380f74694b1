"""Weighted Gram matrices of many weightings at once, which is where EM spends its time."""

from collections.abc import Callable

import numpy as np
from jaxtyping import Float
from scipy.linalg import get_lapack_funcs

FEW = 2  # up to so many weightings, one product per weighting is faster
BLOCK = 2**17  # numbers in a block of products, which should stay in the processor's cache
REGULAR = 1e-10  # the least reciprocal condition number for a Cholesky factor
POTRF, POCON, POTRS = get_lapack_funcs(("potrf", "pocon", "potrs"), dtype=np.float64)
"""LAPACK's Cholesky factor, the reciprocal condition number by it, and the solution by it."""


def weighted_grams(
    x: Float[np.ndarray, "n p"], weights: Float[np.ndarray, "m n"]
) -> Float[np.ndarray, "m p p"]:
    """X^T diag(w) X for every row w of ``weights``.

    With many weightings, the products of all pairs of columns are formed once for a block of rows;
    one matrix product with the weights then has all Gram matrices.

    >>> weighted_grams(np.array([[1.0, 2.0]]), np.array([[10.0]]))
    array([[[10., 20.],
            [20., 40.]]])
    """
    if len(weights) <= FEW:
        return np.stack([(x * w[:, None]).T @ x for w in weights])
    p = x.shape[1]
    above = np.triu_indices(p)
    grams = np.empty((len(weights), p, p))
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
    matrix: Float[np.ndarray, "*m p p"], vector: Float[np.ndarray, "*m p"]
) -> Float[np.ndarray, "*m p"]:
    """Solves symmetric systems without negative eigenvalues; the shortest solution if singular."""
    return solver(matrix)(vector)


def solver(matrix: Float[np.ndarray, "*m p p"]) -> Callable[[np.ndarray], np.ndarray]:
    """As ``solve``, for several vectors one after the other."""
    if matrix.ndim == 2:  # Cholesky's factor takes a tenth of the time of all eigenvectors
        factor, failed = POTRF(matrix)
        if not failed and POCON(factor, np.abs(matrix).sum(axis=0).max())[0] > REGULAR:
            return lambda vector: POTRS(factor, vector)[0]
    values, vectors = np.linalg.eigh(matrix)
    smallest = values[..., -1:] * values.shape[-1] * np.finfo(float).eps
    inverse = np.divide(1, values, out=np.zeros_like(values), where=values > smallest)

    def by_eigenvectors(vector: np.ndarray) -> np.ndarray:
        along = np.einsum("...ij,...i->...j", vectors, vector)
        return np.einsum("...ij,...j->...i", vectors, inverse * along)

    return by_eigenvectors
