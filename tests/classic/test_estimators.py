"""The contract of scikit-learn."""

from typing import Any

import pytest
from sklearn.utils.estimator_checks import check_estimator, parametrize_with_checks

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


@pytest.mark.slow
@pytest.mark.parametrize("kind", ESTIMATORS)
def test_every_check_of_scikit_learn_passes_until_convergence(kind: Any) -> None:
    check_estimator(kind(), on_skip=None)  # those of other array libraries
