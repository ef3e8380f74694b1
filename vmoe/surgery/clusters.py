"""k-means of directions: of tokens, or of the hidden units of an MLP into groups of one size."""

from collections.abc import Callable

import numpy as np
from jaxtyping import Float, Int

ROUNDS = 100
"""Most rounds of k-means; it stops before if no row changes its cluster."""


def unit(rows: Float[np.ndarray, "r d"]) -> Float[np.ndarray, "r d"]:
    """Rows of length 1; a row of zeros stays."""
    lengths = np.linalg.norm(rows, axis=-1, keepdims=True)
    return rows / np.where(lengths > 0, lengths, 1)


def spherical_k_means(
    rows: Float[np.ndarray, "r d"], e: int, seed: int
) -> Float[np.ndarray, "e d"]:
    """The centers, of length 1, of e clusters of rows by the cosine to the center.

    Args:
        seed: of the first centers (k-means++). A cluster that loses all its rows keeps its center.
    """
    rows = unit(rows)

    def nearest(centers: Float[np.ndarray, "e d"]) -> Int[np.ndarray, "r"]:
        return (rows @ centers.T).argmax(-1)

    return unit(_k_means(rows, e, seed, nearest, unit)[1])


def balanced_k_means(rows: Float[np.ndarray, "r d"], e: int, seed: int) -> Int[np.ndarray, "r"]:
    """The cluster of each row, for e clusters of directions, of r / e rows each.

    Every round assigns all rows at once, with the least sum of squared distances.

    Args:
        seed: as for ``spherical_k_means``.
    """
    from scipy.optimize import linear_sum_assignment  # imported here as in _k_means

    rows, size = unit(rows), len(rows) // e

    def nearest(centers: Float[np.ndarray, "e d"]) -> Int[np.ndarray, "r"]:
        # With equal sizes, only the inner products of the squared distances depend on who is where.
        places = np.repeat(rows @ centers.T, size, axis=1)
        return linear_sum_assignment(places, maximize=True)[1] // size

    return _k_means(rows, e, seed, nearest, lambda sums: sums / size)[0]


def _k_means(
    rows: Float[np.ndarray, "r d"],
    e: int,
    seed: int,
    nearest: Callable[[Float[np.ndarray, "e d"]], Int[np.ndarray, "r"]],
    center: Callable[[Float[np.ndarray, "e d"]], Float[np.ndarray, "e d"]],
) -> tuple[Int[np.ndarray, "r"], Float[np.ndarray, "e d"]]:
    """The cluster of each row, and the centers.

    Args:
        nearest: the cluster of each row, for given centers.
        center: the centers, for the sums of the rows of each cluster.
    """
    # Here, since it takes as long to import as half of what every command imports.
    from sklearn.cluster import kmeans_plusplus

    centers, _ = kmeans_plusplus(rows, e, random_state=seed)
    labels = nearest(centers)
    for _ in range(ROUNDS):
        members = np.eye(e, dtype=rows.dtype)[labels]  # r e
        filled = np.bincount(labels, minlength=e)[:, None] > 0
        centers = np.where(filled, center(members.T @ rows), centers)
        previous, labels = labels, nearest(centers)
        if np.array_equal(labels, previous):
            break
    return labels, centers
