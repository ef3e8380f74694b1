"""The contract of scikit-learn."""

from typing import Any

import pytest
from sklearn.linear_model import Ridge
from sklearn.naive_bayes import GaussianNB
from sklearn.utils.estimator_checks import (
    check_estimator,
    check_estimators_partial_fit_n_features,
    check_fit_score_takes_y,
    check_n_features_in_after_fitting,
    parametrize_with_checks,
)

from vmoe.classic import (
    HierarchicalMixtureClassifier,
    HierarchicalMixtureRegressor,
    MixtureOfExpertsClassifier,
    MixtureOfExpertsRegressor,
)

pytestmark = pytest.mark.filterwarnings("ignore::sklearn.exceptions.ConvergenceWarning")


ESTIMATORS = [
    MixtureOfExpertsRegressor,
    MixtureOfExpertsClassifier,
    HierarchicalMixtureRegressor,
    HierarchicalMixtureClassifier,
]


@parametrize_with_checks([kind(max_iter=2) for kind in ESTIMATORS])
def test_every_check_of_scikit_learn_passes(estimator: Any, check: Any) -> None:
    check(estimator)


@pytest.mark.parametrize(
    "model",
    [
        MixtureOfExpertsRegressor(experts=Ridge(), max_iter=2),
        MixtureOfExpertsRegressor(experts="student_t", max_iter=2),
        MixtureOfExpertsClassifier(experts=GaussianNB(), max_iter=2),
    ],
    ids=lambda model: str(model.experts),
)
@pytest.mark.parametrize(
    "check",
    [
        check_estimators_partial_fit_n_features,
        check_fit_score_takes_y,
        check_n_features_in_after_fitting,
    ],
)
def test_experts_that_cannot_learn_on_line_pass_the_checks_that_call_partial_fit(
    model: Any, check: Any
) -> None:
    check(type(model).__name__, model)


@pytest.mark.slow
@pytest.mark.parametrize(
    "estimator",
    [*(kind(tol=1e-3) for kind in ESTIMATORS), MixtureOfExpertsRegressor(experts="student_t")],
    ids=str,
)
def test_every_check_of_scikit_learn_passes_until_convergence(estimator: Any) -> None:
    check_estimator(estimator, on_skip=None)  # other array libraries are skipped
