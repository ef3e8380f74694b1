"""The contract of scikit-learn."""

import warnings
from typing import Any

import numpy as np
import pytest
from sklearn.ensemble import GradientBoostingRegressor
from sklearn.exceptions import DataConversionWarning
from sklearn.linear_model import Ridge
from sklearn.model_selection import GridSearchCV
from sklearn.naive_bayes import GaussianNB, MultinomialNB
from sklearn.neighbors import KNeighborsRegressor
from sklearn.utils import get_tags
from sklearn.utils.estimator_checks import (
    check_estimator,
    check_estimator_sparse_tag,
    check_estimators_partial_fit_n_features,
    check_fit_score_takes_y,
    check_n_features_in,
    check_n_features_in_after_fitting,
    check_positive_only_tag_during_fit,
    check_regressors_no_decision_function,
    parametrize_with_checks,
)

from tests.classic import problems
from vmoe.classic import (
    HierarchicalMixtureClassifier,
    HierarchicalMixtureRegressor,
    MixtureOfExpertsClassifier,
    MixtureOfExpertsRegressor,
    mixture_path,
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
    "model, check",
    [
        (MixtureOfExpertsRegressor(experts="poisson", max_iter=2), check_n_features_in),
        (
            HierarchicalMixtureRegressor((1, 2), experts=["poisson", "poisson"], max_iter=2),
            check_regressors_no_decision_function,
        ),
        (MixtureOfExpertsClassifier(experts=GaussianNB(), max_iter=2), check_estimator_sparse_tag),
        (
            MixtureOfExpertsClassifier(experts=MultinomialNB(), max_iter=2),
            check_positive_only_tag_during_fit,
        ),
    ],
    ids=lambda value: str(getattr(value, "experts", "")),
)
def test_a_mixture_refuses_what_its_experts_refuse_and_its_tags_say_so(
    model: Any, check: Any
) -> None:
    check(type(model).__name__, model)


def test_experts_of_one_output_make_a_mixture_of_one_output() -> None:
    model = MixtureOfExpertsRegressor(experts=GradientBoostingRegressor(n_estimators=2), max_iter=2)
    x = np.arange(40.0).reshape(20, 2)
    assert not get_tags(model).target_tags.multi_output
    with pytest.warns(DataConversionWarning, match="A column-vector y was passed"):
        assert model.fit(x, x[:, :1]).predict(x).shape == (20,)
    with pytest.raises(ValueError, match="experts=Gradient.*y should be a 1d array"):
        model.fit(x, x)
    search = MixtureOfExpertsRegressor(
        experts=GridSearchCV(Ridge(), {"alpha": [1.0]}, cv=2), max_iter=1
    )
    assert search.fit(x, x).predict(x).shape == (20, 2)  # whatever the tags of a search say


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
    [
        HierarchicalMixtureClassifier(tol=1e-2),
        MixtureOfExpertsRegressor(experts="student_t", tol=2e-2),
    ],
    ids=str,
)
def test_every_check_of_scikit_learn_passes_until_convergence(estimator: Any) -> None:
    check_estimator(estimator, on_skip=None)  # other array libraries are skipped


def test_a_row_of_weight_0_does_not_change_the_noise_of_a_regressor() -> None:
    x, y = problems.two_planes(0)
    weight = np.arange(80) % 2
    some = weight > 0
    model = MixtureOfExpertsRegressor(1, experts=Ridge())
    with_all = model.fit(x, y, weight).expert_std_
    assert with_all == pytest.approx(model.fit(x[some], y[some]).expert_std_, rel=1e-12)


@pytest.mark.parametrize("experts", [KNeighborsRegressor(5), ["linear", KNeighborsRegressor(5)]])
def test_an_expert_that_cannot_leave_rows_out_has_the_noise_of_its_own_rows(experts: Any) -> None:
    """Five neighbours of six rows, of which four remain in a fold."""
    x, y = problems.two_planes(0, rows=6)
    number = 2 if isinstance(experts, list) else 1
    model = MixtureOfExpertsRegressor(number, experts=experts, max_iter=3, random_state=0)
    with pytest.warns(
        UserWarning, match=r"expert \d: .* has the noise of rows that it has seen"
    ) as found:
        model.fit(x, y)
    (message,) = [str(each.message) for each in found if "has seen" in str(each.message)]
    assert message.startswith(f"expert {number - 1}: KNeighborsRegressor()")
    assert "n_neighbors = 5, n_samples_fit = 4" in message
    if number == 1:
        squares = (y - model.predict(x)) ** 2
        assert model.expert_std_[0] == pytest.approx(np.sqrt(squares.mean()))


def test_a_bootstrap_and_the_folds_of_a_path_do_not_repeat_the_warning_of_noise() -> None:
    x, y = problems.two_planes(0, rows=6)
    model = MixtureOfExpertsRegressor(2, experts=["linear", KNeighborsRegressor(5)], tol=1e-3)
    with pytest.warns(UserWarning, match="has the noise of rows that it has seen"):
        model.fit(x, y)
    with warnings.catch_warnings(action="error"):
        assert len(model.bootstrap(x, 3, random_state=0).refits) > 1
    model.set_params(experts=KNeighborsRegressor(5))
    with warnings.catch_warnings(record=True, action="always") as found:
        mixture_path(model, x, y, [1], cv=[(np.arange(5), [5])])
    assert len(found) == 1


def test_an_expert_that_lost_its_rows_keeps_its_noise_in_a_list_as_alone() -> None:
    """New rows lie far on the side of the other one, and have other noise."""
    x = problems.inputs(0)
    start, noise = np.eye(2)[(x[:, 0] > 0).astype(int)], problems.inputs(1, columns=1)[:, 0]
    far, found = x - [9, 0], []
    for experts in (Ridge(), [Ridge(), Ridge()]):
        model = MixtureOfExpertsRegressor(2, experts=experts, start=start, warm_start=True)
        model.set_params(max_iter=1).fit(x, x[:, 1] + noise)
        model.fit(far, far[:, 1] + 3 * noise)
        assert 0 < model.responsibilities(far, far[:, 1] + 3 * noise)[:, 1].sum() < 1e-12
        found.append(model.expert_std_)
    assert found[0] == pytest.approx(found[1])
