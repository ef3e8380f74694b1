"""Groups of rows with one expert: repeated measures."""

from typing import Any

import numpy as np
import pytest
import sklearn
from numpy.testing import assert_allclose
from pandas import NA, Series
from scipy import stats
from scipy.special import logsumexp
from sklearn.model_selection import GridSearchCV, GroupKFold
from sklearn.tree import DecisionTreeRegressor

from tests.classic import problems
from tests.classic.by_jax import objective_of
from vmoe.classic import (
    HierarchicalMixtureRegressor,
    LogLikelihoodScorer,
    MixtureOfExpertsClassifier,
    MixtureOfExpertsRegressor,
    mixture_path,
)
from vmoe.classic.experts.estimators import folds_of

pytestmark = pytest.mark.filterwarnings("ignore::sklearn.exceptions.ConvergenceWarning")
FREE: dict[str, Any] = {"gate_penalty": 0.0, "expert_penalty": 0.0}


def persons(seed: int = 0, number: int = 20, noise: float = 1.0) -> tuple[np.ndarray, ...]:
    """Persons with five measures each, in any order: x, y, who it is, and who rises with x."""
    random = np.random.default_rng(seed)
    who = random.permutation(np.repeat(np.arange(number), 5))
    rises = random.random(number) < 0.5
    x = random.uniform(-1, 1, (5 * number, 1))
    y = np.where(rises[who], x[:, 0], -x[:, 0]) + noise * random.normal(size=5 * number)
    return x, y, np.array([f"person {number}" for number in who]), rises[who]


def test_em_is_a_loop_over_groups() -> None:
    x, y, who, _ = persons()
    start = np.random.default_rng(1).dirichlet([1, 1], 100)
    model = MixtureOfExpertsRegressor(
        gate_features=[], start=start, max_iter=3, tol=0.0, variance_floor=0.0, **FREE
    )
    model.fit(x, y, groups=who)
    h, columns = start, np.column_stack([np.ones(100), x])
    names = np.unique(who)
    for step in range(3):
        proportion = np.mean([h[who == name].mean(axis=0) for name in names], axis=0)
        coefs, stds = [], []
        for e in range(2):
            root = np.sqrt(h[:, e])
            coef = np.linalg.lstsq(columns * root[:, None], y * root)[0]
            coefs.append(coef)
            stds.append(np.sqrt(h[:, e] @ (y - columns @ coef) ** 2 / h[:, e].sum()))
        h, total = np.empty((100, 2)), 0.0
        for name in names:
            joint = np.log(proportion)
            for t in np.flatnonzero(who == name):
                joint = joint + [
                    stats.norm(columns[t] @ coef, std).logpdf(y[t])
                    for coef, std in zip(coefs, stds, strict=True)
                ]
            h[who == name] = np.exp(joint - logsumexp(joint))
            total += logsumexp(joint)
        assert_allclose(model.history_[step], total)
    assert_allclose([expert.coef_ for expert in model.experts_], coefs)
    assert_allclose([expert.std_ for expert in model.experts_], stds)
    assert_allclose(model.gate_proba(x[:1])[0], proportion)
    assert_allclose(model.responsibilities(x, y, groups=who), h, atol=1e-12)
    parameters = 2 * 3 + 1
    assert_allclose(model.aic(x, y, groups=who), 2 * parameters - 2 * total)
    sure = sum(np.log(h[who == name][0].max()) for name in names)
    assert_allclose(model.icl(x, y, groups=who), parameters * np.log(100) - 2 * total - 2 * sure)


@pytest.mark.parametrize("kind", [MixtureOfExpertsRegressor, MixtureOfExpertsClassifier])
def test_groups_of_one_row_are_rows(kind: Any) -> None:
    x, y = problems.crossed(0)
    start = np.random.default_rng(1).dirichlet([1, 1], 80)
    models = [kind(start=start, max_iter=3) for _ in range(2)]
    models[0].fit(x, y)
    models[1].fit(x, y, groups=np.random.default_rng(0).permutation(80))
    assert_allclose(models[1].history_, models[0].history_)
    assert_allclose(models[1].gate_coef_, models[0].gate_coef_, atol=1e-7)


def test_integer_weights_are_repeated_rows_of_the_same_group() -> None:
    x, y, who, _ = persons()
    z = np.column_stack([x, who == "person 3", who > "person 15"])
    weight = np.random.default_rng(0).integers(0, 4, 100)
    data = z.repeat(weight, axis=0), y.repeat(weight)
    one, other = (MixtureOfExpertsRegressor(gate_features=[1, 2], max_iter=5) for _ in range(2))
    one.fit(z, y, weight, who)
    other.fit(*data, groups=who.repeat(weight))
    assert_allclose(one.history_, other.history_)
    assert_allclose(one.gate_coef_, other.gate_coef_, atol=1e-6)
    assert_allclose(one.bic(z, y, weight, who), other.bic(*data, groups=who.repeat(weight)))


@pytest.mark.parametrize("start", ["principal", "random", "kmeans"])
def test_groups_that_differ_in_their_slope_are_found_where_rows_do_not_tell(start: str) -> None:
    x, y, who, rises = persons(number=60)
    model = MixtureOfExpertsRegressor(gate_features=[], start=start, n_init=3, random_state=0)
    found = model.fit(x, y, groups=who).responsibilities(x, y, groups=who).argmax(axis=1)
    right = np.mean(found == rises)
    assert max(right, 1 - right) > 0.85
    alone = model.fit(x, y).responsibilities(x, y).argmax(axis=1)
    assert abs(np.mean(alone == rises) - 0.5) < 0.3


def test_a_tree_grows_in_groups_and_estimators_leave_out_whole_groups() -> None:
    x, y, who, _ = persons()
    tree = HierarchicalMixtureRegressor((2,), growth=3, gate_features=[], max_iter=20)
    responsibilities = tree.fit(x, y, groups=who).responsibilities(x, y, groups=who)
    for name in np.unique(who):
        assert np.ptp(responsibilities[who == name], axis=0).max() == 0
    experts = DecisionTreeRegressor(max_depth=1)
    model = MixtureOfExpertsRegressor(experts=experts, gate_features=[], max_iter=2)
    folds = folds_of(model.fit(x, y, groups=who)._labeled_rows(x, y, groups=who))
    assert all(len(set(folds[who == name])) == 1 for name in np.unique(who))
    assert np.bincount(folds).tolist() == [20] * 5


@pytest.mark.slow
def test_jax_computes_the_log_likelihood_of_groups() -> None:
    x, y, who, _ = persons()
    model = MixtureOfExpertsRegressor(gate_features=[], max_iter=3).fit(x, y, groups=who)
    fitted = model._mixture
    rows = model._labeled_rows(x, y, np.arange(100) % 3, who)
    value = objective_of(fitted, rows)
    assert value == pytest.approx(fitted.log_likelihood(rows) - fitted.penalty(), rel=1e-12)


def test_searches_and_paths_keep_groups_together() -> None:
    x, y, who, _ = persons()
    model = MixtureOfExpertsRegressor(gate_features=[], max_iter=5)
    path = mixture_path(model, x, y, [1, 2], cv=3, groups=who)
    splits = GroupKFold(3, shuffle=True, random_state=0).split(x, y, who)
    again = mixture_path(model, x, y, [1, 2], cv=list(splits), groups=who)
    assert path.table["held_out"] == again.table["held_out"]
    assert path.table["bic"] == [m.bic(x, y, groups=who) for m in path.estimators]
    folds = GroupKFold(3, shuffle=True, random_state=0)
    with sklearn.config_context(enable_metadata_routing=True):
        scorer = LogLikelihoodScorer().set_score_request(groups=True)
        search = GridSearchCV(model, {"n_experts": [1, 2]}, scoring=scorer, cv=folds)
        with pytest.raises(
            ValueError, match=r"\[groups\] are passed .* requested or not requested"
        ):
            search.fit(x, y, groups=who)
        model.set_fit_request(groups=True)
        found = search.set_params(refit=False).fit(x, y, groups=who).cv_results_
    rows = [np.sum(np.isin(who, who[test])) for _, test in folds.split(x, y, who)]
    means = [
        np.average([found[f"split{i}_test_score"][n] for i in range(3)], weights=rows)
        for n in range(2)
    ]
    assert_allclose(means, path.table["held_out"])


def test_after_a_fit_with_groups_a_score_needs_them() -> None:
    x, y, who, _ = persons()
    model = MixtureOfExpertsRegressor(gate_features=[], max_iter=5).fit(x, y, groups=who)
    names = ("log_likelihood", "aic", "bic", "icl", "responsibilities", "degenerate_experts")
    for name in (*names, "summary", "splits"):
        with pytest.raises(ValueError, match="groups: the fit had groups, without which rows"):
            getattr(model, name)(x, y)
    with pytest.raises(ValueError, match="groups: the fit had groups"):
        LogLikelihoodScorer()(model, x, y)
    with pytest.raises(ValueError, match="the fit had groups, but a bootstrap draws rows one by"):
        model.bootstrap(x)
    alone = model.log_likelihood(x, y, groups=np.arange(100))
    assert model.log_density(x, y).sum() == pytest.approx(alone)
    assert model.fit(x, y).bic(x, y) == model.bic(x, y, groups=None)


@pytest.mark.filterwarnings("ignore:covariance. the maximum for these rows")
def test_errors_of_parameters_are_those_of_groups() -> None:
    """Groups of equal rows have the errors of a fit to one row of each that weighs as many."""
    x, y, who, _ = persons(number=80)
    model = HierarchicalMixtureRegressor((2,), gate_features=[], tol=1e-9, max_iter=2000, **FREE)
    found = model.fit(x, y, groups=who).summary(x, y, groups=who)
    assert not found.notes and np.isfinite(found.standard_errors).all()
    (split,) = model.splits(x, y, groups=who)
    assert_allclose(split.covariance, found.covariance[:1, :1])
    proportion = model.gate_proba(x[:1])[0]
    known = 1 / np.sqrt(80 * proportion.prod())  # if it were known who rises
    assert known < found.standard_errors[0] < 3 * known
    by_row = model.fit(x, y).summary(x, y).standard_errors[0]
    assert found.standard_errors[0] < by_row


def test_what_is_no_group_is_refused() -> None:
    x, y, who, _ = persons()
    model = MixtureOfExpertsRegressor()
    with pytest.raises(ValueError, match="gate sees x0, which is not constant in group person"):
        model.fit(x, y, groups=who)
    model.set_params(gate_features=[])
    for groups in (
        who[1:],
        [np.nan, *range(99)],
        ["a", np.nan] * 50,
        [None] * 100,
        ["a", 1] * 50,
        Series(["a", 1] * 50),
        Series(["a", NA] * 50),
        np.zeros((100, 2)),
    ):
        with pytest.raises(ValueError, match=r"^groups: expected one number or string per row"):
            model.fit(x, y, groups=groups)
