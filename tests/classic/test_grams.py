"""The linear algebra of the M-steps."""

import numpy as np
import pytest
from numpy.testing import assert_allclose

from vmoe.classic.grams import solve, weighted_grams


@pytest.mark.parametrize("twin", [False, True])
def test_a_system_has_the_solution_of_the_pseudoinverse_also_with_twin_columns(twin: bool) -> None:
    random = np.random.default_rng(0)
    for _ in range(50):
        x = random.normal(size=(30, 4))
        if twin:
            x[:, 3] = random.normal() * x[:, 1]
        matrix, vector = x.T @ x, x.T @ random.normal(size=30)
        expected = np.linalg.pinv(matrix, rcond=1e-13, hermitian=True) @ vector
        assert_allclose(solve(matrix, vector), expected, rtol=1e-9, atol=1e-9)
        assert_allclose(solve(matrix, np.eye(4)) @ vector, expected, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("columns", [1, 7, 40])
@pytest.mark.parametrize("weightings", [1, 2, 3, 8, 11])
def test_gram_matrices_are_sums_over_the_rows(weightings: int, columns: int) -> None:
    random = np.random.default_rng(0)
    x, weights = random.normal(size=(1000, columns)), random.normal(size=(weightings, 1000))
    expected = np.einsum("mn,ni,nj->mij", weights, x, x)
    assert_allclose(weighted_grams(x, weights), expected, rtol=1e-10, atol=1e-10)
