"""k-means of directions, against planted clusters and all ways to divide a few rows."""

import itertools

import numpy as np

from vmoe.surgery.clusters import balanced_k_means, spherical_k_means, unit


def test_planted_directions_are_found_whatever_the_lengths_of_the_rows() -> None:
    rng = np.random.default_rng(0)
    truth = unit(rng.standard_normal((4, 16)))
    members = rng.integers(4, size=400)
    rows = (truth[members] + 0.05 * rng.standard_normal((400, 16))) * rng.uniform(0.1, 9, (400, 1))
    centers = spherical_k_means(rows, 4, seed=0)
    similarity = centers @ truth.T
    assert sorted(similarity.argmax(1)) == [0, 1, 2, 3]
    np.testing.assert_allclose(similarity.max(1), 1, atol=1e-2)
    np.testing.assert_allclose(np.linalg.norm(centers, axis=1), 1, rtol=1e-6)


def test_balanced_clusters_have_one_size_and_the_least_distances() -> None:
    rng = np.random.default_rng(1)
    rows = rng.standard_normal((8, 5))
    labels = np.stack([balanced_k_means(rows, 2, seed) for seed in range(5)])
    assert (labels.sum(1) == 4).all()

    def distances(members: np.ndarray) -> float:
        return sum(((x - x.mean(0)) ** 2).sum() for x in (unit(rows)[members == i] for i in (0, 1)))

    ways = [np.isin(np.arange(8), chosen) for chosen in itertools.combinations(range(8), 4)]
    least = min(map(distances, ways))
    assert np.isclose(min(map(distances, labels)), least)


def test_equal_rows_leave_clusters_empty_and_zeros_have_no_direction() -> None:
    centers = spherical_k_means(np.array([[3.0, 0.0]] * 3 + [[0.0, 0.0]]), 2, seed=0)
    assert np.isfinite(centers).all() and (centers == [1.0, 0.0]).all(1).any()
