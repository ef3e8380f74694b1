"""Predictive distributions of regressions."""

from typing import Any

import numpy as np
import pytest
from numpy.testing import assert_allclose
from scipy import stats
from scipy.sparse import csr_array
from sklearn.linear_model import Ridge
from sklearn.neighbors import KNeighborsRegressor
from sklearn.tree import DecisionTreeRegressor

from tests.classic import problems
from vmoe.classic import MixtureOfExpertsRegressor
from vmoe.classic.experts.estimators import folds_of

pytestmark = pytest.mark.filterwarnings("ignore::sklearn.exceptions.ConvergenceWarning")


def two_valued(rows: int = 200) -> tuple[np.ndarray, np.ndarray]:
    """Two lines, one above the other, between which a coin decides."""
    random = np.random.default_rng(0)
    x = np.linspace(-1, 1, rows)[:, None]
    return x, random.choice([-3.0, 3.0], rows) + x[:, 0] + 0.1 * random.normal(size=rows)


def test_a_relation_with_two_values_has_samples_at_both_and_none_between() -> None:
    x, y = two_valued()
    found = MixtureOfExpertsRegressor(2).fit(x, y).predict_dist(x)
    drawn = found.sample(50, random_state=0) - x[:, 0]
    assert drawn.shape == (50, 200)
    assert np.mean(np.abs(np.abs(drawn) - 3) < 0.5) > 0.99
    assert 0.3 < np.mean(drawn > 0) < 0.7
    assert_allclose(found.std(), 3, rtol=0.1)


@pytest.mark.parametrize(
    "experts", ["linear", "student_t", "poisson", ["linear", "student_t"], Ridge()]
)
def test_moments_and_quantiles_are_those_of_the_samples(experts: Any) -> None:
    x, y = problems.counts(0)
    model = MixtureOfExpertsRegressor(2, experts=experts, max_iter=10).fit(x, y)
    found = model.predict_dist(x[:5])
    drawn = found.sample(4000, random_state=1)
    assert_allclose(found.mean(), model.predict(x[:5]))
    assert_allclose(drawn.mean(axis=0), found.mean(), atol=5 * found.std().max() / 4000**0.5)
    for level in (0.1, 0.5, 0.9):
        below = np.mean(drawn <= found.quantile(level), axis=0)
        assert np.all(below >= level - 0.03)
        assert np.all(np.mean(drawn < found.quantile(level) - 1e-6, axis=0) <= level + 0.03)
    if experts == "poisson":
        assert np.array_equal(found.quantile(0.9), np.round(found.quantile(0.9)))


def test_one_linear_expert_is_a_normal_distribution() -> None:
    x, y = problems.two_planes(0)
    model = MixtureOfExpertsRegressor(1).fit(x, y)
    found, normal = model.predict_dist(x), stats.norm(model.predict(x), model.experts_[0].std_)
    assert_allclose(found.quantile([0.025, 0.5]), [normal.ppf(0.025), normal.ppf(0.5)], atol=1e-8)
    assert_allclose(found.cdf(y), normal.cdf(y))
    assert_allclose(found.std(), normal.std())


def test_every_output_has_a_distribution_of_its_own() -> None:
    x, y = problems.two_planes(0)
    both = np.column_stack([y, 10 * y])
    found = MixtureOfExpertsRegressor(2).fit(x, both).predict_dist(x)
    assert found.sample(3).shape == (3, 80, 2)
    assert found.quantile([0.1, 0.9]).shape == (2, 80, 2)
    assert_allclose(found.std()[:, 1], 10 * found.std()[:, 0], rtol=1e-6)


@pytest.mark.parametrize("probability", [0, 1, [0.5, 2], np.nan])
def test_a_quantile_of_no_probability_is_a_value_error(probability: Any) -> None:
    x, y = problems.two_planes(0)
    found = MixtureOfExpertsRegressor(2, max_iter=1).fit(x, y).predict_dist(x)
    with pytest.raises(ValueError, match="probability"):
        found.quantile(probability)


@pytest.mark.parametrize("expert", [DecisionTreeRegressor(), KNeighborsRegressor(1)])
def test_an_interval_of_experts_that_remember_their_rows_covers_others(expert: Any) -> None:
    """In-sample residuals would be zero; the oracle is the share of new targets inside."""
    x, y = problems.two_planes(0, rows=600)
    model = MixtureOfExpertsRegressor(2, experts=expert, max_iter=5, random_state=0)
    low, high = model.fit(x[:300], y[:300]).predict_dist(x[300:]).quantile([0.05, 0.95])
    assert np.mean((y[300:] >= low) & (y[300:] <= high)) == pytest.approx(0.9, abs=0.07)


def test_noise_of_estimators_is_that_of_rows_left_out() -> None:
    """Of one expert, by a loop over the folds; equal rows are in the same fold, in any form."""
    x, y = problems.two_planes(0)
    x, y = np.repeat(x * (np.abs(x) > 0.5), 2, axis=0), np.repeat(y, 2)
    y[0], y[1] = 0.0, -0.0
    model = MixtureOfExpertsRegressor(1, experts=DecisionTreeRegressor(random_state=0)).fit(x, y)
    folds = folds_of(model._labeled_rows(x, y))
    assert np.array_equal(folds[::2], folds[1::2])
    assert np.bincount(folds).tolist() == [32] * 5
    halves = np.repeat(x.ravel() / 2, 2), np.tile([0, 0, 1, 1], 160), np.arange(0, 641, 4)
    for form in (np.where(x == 0, -0.0, x), csr_array(x), csr_array(halves)):
        assert np.array_equal(folds_of(model._labeled_rows(form, y)), folds)
    left = np.empty(160)
    for fold in range(5):
        out = folds == fold
        tree = DecisionTreeRegressor(random_state=model.experts_[0].random_state)
        left[out] = y[out] - tree.fit(x[~out], y[~out]).predict(x[out])
    assert_allclose(model.predict_dist(x).std(), np.sqrt(np.mean(left**2)))
    shuffled = np.random.default_rng(0).permutation(160)
    assert np.array_equal(folds_of(model._labeled_rows(x[shuffled], y[shuffled])), folds[shuffled])
