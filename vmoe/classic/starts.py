"""Where EM starts: groups of rows, one per expert, found in the standardized (x, y).

The default depends on neither the number nor the order of rows, so that integer weights are the
same as repeated rows: quantiles along the first principal direction, then weighted Lloyd steps. In
a tree, the rows of a gate are grouped among its children, and so on down.

Groups of inputs suit a relation that bends, and groups of residuals suit one that has two values
for the same input, so the default has both to choose from.
"""

from collections.abc import Callable

import numpy as np
from jaxtyping import Float, Int
from numpy.typing import ArrayLike
from sklearn.cluster import KMeans

from vmoe.classic.rows import Rows
from vmoe.classic.tree import TreeGate, leaves

LLOYD_STEPS = 10
TARGETS = 0.5  # the scale of targets: a gate sees inputs, so groups should differ in these first
RIDGE = 0.01
UNSURE = 0.2  # all experts share this part of each row, so that no gate starts too sure
DIGITS = 8  # numbers that agree to so many decimals are equal, so that rounding decides nothing

Grouping = Callable[[np.ndarray, np.ndarray, int, np.random.RandomState], np.ndarray]


def start_posteriors(
    kind: str, tree: TreeGate, rows: Rows, random: np.random.RandomState
) -> list[Float[np.ndarray, "n e"]]:
    """The responsibilities of a start by name: one or more to choose from.

    Args:
        kind: "principal", "kmeans", or "random" (the nearest of randomly drawn rows).
        tree: the gates, whose experts get the groups.
        rows: the rows, with targets and weights.
        random: the source of random numbers.
    """
    points = [joined(rows)]
    if kind == "principal":
        points.append(residuals(rows))
    group, experts, weight = GROUPINGS[kind], len(leaves(tree)), rows.sums(rows.weight)
    found = [assign(tree, z, weight, lambda z, w, k: group(z, w, k, random)) for z in points]
    return [unsure(expert, experts)[rows.unit] for expert in found]


def joined(rows: Rows) -> Float[np.ndarray, "u m"]:
    """The points in which groups are found: standardized inputs beside smaller targets.

    Of given groups of rows they are the means, beside ``residuals``, since such groups may differ
    in the relation of targets and inputs alone.
    """
    points = np.hstack([rows.inputs(), TARGETS * rows.targets()])
    return points if rows.groups is None else np.hstack([_means(rows, points), residuals(rows)])


def unsure(group: Int[np.ndarray, "n"], k: int) -> Float[np.ndarray, "n k"]:
    """Responsibilities from groups: most of a row is its group's, and all groups share the rest."""
    return (1 - UNSURE) * np.eye(k)[group] + UNSURE / k


def residuals(rows: Rows) -> Float[np.ndarray, "u m"]:
    """What a ridge regression leaves of the targets; the ridge keeps it from being rounding.

    Of given groups of rows, it is the mean of what is left, and of its products with the inputs:
    the directions in which the intercept and the slopes of the group differ from those of all.
    """
    inputs, targets, weight = rows.inputs(), rows.targets(), rows.weight
    scaled = inputs * (weight / weight.sum())[:, None]
    gram = scaled.T @ inputs + RIDGE * np.eye(inputs.shape[1])
    left = targets - inputs @ np.linalg.solve(gram, scaled.T @ targets)
    if rows.groups is None:
        return left
    products = left[:, :, None] * inputs[:, None]
    return _means(rows, np.hstack([left, products.reshape(len(left), -1)]))


def _means(rows: Rows, points: Float[np.ndarray, "n m"]) -> Float[np.ndarray, "u m"]:
    """The weighted mean of every given group of rows."""
    return rows.sums(points * rows.share[:, None])


def assign(
    tree: TreeGate,
    points: Float[np.ndarray, "n d"],
    weight: Float[np.ndarray, "n"],
    group: Callable[[np.ndarray, np.ndarray, int], np.ndarray],
) -> Int[np.ndarray, "n"]:
    """The expert of each row: the gate groups the rows, and so do the gates below."""
    groups = group(points, weight, len(tree.children))
    expert = np.empty(len(points), int)
    for k, child in enumerate(tree.children):
        rows = groups == k
        expert[rows] = (
            assign(child, points[rows], weight[rows], group)
            if isinstance(child, TreeGate)
            else child
        )
    return expert


def principal(
    points: np.ndarray, weight: np.ndarray, k: int, random: np.random.RandomState | None = None
) -> Int[np.ndarray, "n"]:
    """Groups of equal weight along the first principal direction, then Lloyd steps."""
    if weight.sum() == 0:
        return np.zeros(len(points), int)
    share = weight / weight.sum()
    away = points - share @ points
    along = np.round(away @ first_direction((away * share[:, None]).T @ away), DIGITS)
    order = np.argsort(along, kind="stable")
    reached = np.round(np.cumsum(share[order]), DIGITS)
    levels = np.round(np.arange(1, k) / k, DIGITS)
    cuts = along[order][np.searchsorted(reached, levels).clip(max=len(order) - 1)]
    return lloyd(points, weight, np.searchsorted(cuts, along), k)


def first_direction(covariance: Float[np.ndarray, "d d"]) -> Float[np.ndarray, "d"]:
    """The first principal direction; if several are equally long, as for a grid, one of them.

    It is the part within their span of the column that lies most in it, so that neither the number
    nor the order of rows, which change the rounding, have an influence.
    """
    values, vectors = np.linalg.eigh(covariance)
    first = vectors[:, values >= (1 - 10.0**-DIGITS) * values[-1]]
    onto = first @ first.T
    return onto[:, first_largest(np.diag(onto))]


def first_largest(values: ArrayLike) -> int:
    """The index of the largest finite value; of those that differ by rounding alone, the first."""
    values = np.where(np.isfinite(values), values, -np.finfo(float).max)
    least = values.max() - 10.0**-DIGITS * max(1.0, abs(values.max()))
    return int(np.argmax(values >= least))


def lloyd(
    points: Float[np.ndarray, "n d"],
    weight: Float[np.ndarray, "n"],
    groups: Int[np.ndarray, "n"],
    k: int,
) -> Int[np.ndarray, "n"]:
    """Moves rows to the nearest mean of a group, repeatedly; an empty group stays empty."""
    for _ in range(LLOYD_STEPS):
        member = weight[:, None] * np.eye(k)[groups]
        size = member.sum(axis=0)
        means = (member.T @ points) / np.where(size > 0, size, 1)[:, None]
        distance = np.where(size > 0, np.sum(means**2, axis=1) - 2 * points @ means.T, np.inf)
        groups = np.round(distance, DIGITS).argmin(axis=1)
    return groups


def nearest_drawn(
    points: np.ndarray, weight: np.ndarray, k: int, random: np.random.RandomState
) -> Int[np.ndarray, "n"]:
    """Groups around rows that are drawn in proportion to their weights."""
    some = np.flatnonzero(weight > 0)
    if len(some) < k:
        return np.zeros(len(points), int)
    centers = points[random.choice(some, k, replace=False, p=weight[some] / weight[some].sum())]
    return np.argmin(np.sum(centers**2, axis=1) - 2 * points @ centers.T, axis=1)


def kmeans(
    points: np.ndarray, weight: np.ndarray, k: int, random: np.random.RandomState
) -> Int[np.ndarray, "n"]:
    """Groups by k-means, from random centers."""
    if np.sum(weight > 0) < k:
        return np.zeros(len(points), int)
    return KMeans(k, n_init=1, random_state=random).fit_predict(points, sample_weight=weight)


GROUPINGS: dict[str, Grouping] = {
    "principal": principal,
    "random": nearest_drawn,
    "kmeans": kmeans,
}
