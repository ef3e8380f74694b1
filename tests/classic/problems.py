"""Random problems for mixtures."""

import numpy as np


def inputs(seed: int, rows: int = 80, columns: int = 2) -> np.ndarray:
    """Rows of normal numbers."""
    return np.random.default_rng(seed).normal(size=(rows, columns))


def two_planes(seed: int, rows: int = 80) -> tuple[np.ndarray, np.ndarray]:
    """A regression by two planes, one on each side of a soft border."""
    random, x = np.random.default_rng(seed), inputs(seed, rows)
    left = random.random(rows) < 1 / (1 + np.exp(3 * x[:, 0]))
    y = np.where(left, x @ [1.0, -2.0] + 1, x @ [-1.0, 0.5] - 1)
    return x, y + 0.2 * random.normal(size=rows)


def counts(seed: int, rows: int = 80) -> tuple[np.ndarray, np.ndarray]:
    """Counts whose rate rises on one side of a border and falls on the other."""
    x = inputs(seed, rows)
    rate = np.exp(np.where(x[:, 0] > 0, 1 + x[:, 1], 1 - x[:, 1]))
    return x, np.random.default_rng(seed).poisson(rate).astype(float)


def crossed(seed: int, rows: int = 80, classes: int = 2) -> tuple[np.ndarray, np.ndarray]:
    """Classes by angle, such that opposite sectors are alike: no linear model finds them."""
    x = inputs(seed, rows)
    sector = np.floor(np.arctan2(x[:, 1], x[:, 0]) / np.pi * classes)
    return x, sector.astype(int) % classes
