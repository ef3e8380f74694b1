"""Options of mixtures, what they refuse, and their place among scikit-learn's tools."""

import subprocess
import sys
import warnings
from typing import Any

import numpy as np
import pytest
from numpy.testing import assert_allclose
from pandas import DataFrame
from scipy import sparse, stats
from sklearn.base import clone
from sklearn.datasets import load_diabetes
from sklearn.discriminant_analysis import LinearDiscriminantAnalysis
from sklearn.dummy import DummyRegressor
from sklearn.exceptions import ConvergenceWarning, NotFittedError
from sklearn.gaussian_process import GaussianProcessRegressor
from sklearn.linear_model import LinearRegression, LogisticRegression, Ridge
from sklearn.model_selection import GridSearchCV
from sklearn.multioutput import MultiOutputRegressor
from sklearn.naive_bayes import GaussianNB
from sklearn.neighbors import KNeighborsRegressor
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler
from sklearn.svm import LinearSVC
from sklearn.tree import DecisionTreeClassifier, DecisionTreeRegressor, ExtraTreeRegressor
from sklearn.utils import get_tags

from tests.classic import problems
from vmoe.classic import (
    HierarchicalMixtureClassifier,
    HierarchicalMixtureRegressor,
    MixtureOfExpertsClassifier,
    MixtureOfExpertsRegressor,
    PartitionGate,
    StudentT,
    plot_tree,
)

pytestmark = pytest.mark.filterwarnings("ignore::sklearn.exceptions.ConvergenceWarning")
REGRESSORS = (MixtureOfExpertsRegressor, HierarchicalMixtureRegressor)


PARAMETERS: dict[str, Any] = {
    "gate_coef": np.zeros((2, 3)),
    "expert_coef": np.eye(2, 3),
    "expert_std": [1.0, 1.0],
}


def three_columns(seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """The two planes' columns, and one that means nothing."""
    x, y = problems.two_planes(seed)
    return np.column_stack([x, problems.inputs(seed + 99, columns=1)]), y


@pytest.mark.parametrize("kind", REGRESSORS)
@pytest.mark.parametrize(
    "gate",
    [
        *([0], ["a"], "a", [True, False, False], slice(1), slice("a", "a"), np.array([0])),
        lambda X: ["a"],
    ],
)
def test_the_gate_sees_the_columns_it_is_given(kind: Any, gate: Any) -> None:
    x, y = three_columns()
    frame = DataFrame(x, columns=["a", "b", "c"])
    model = kind(gate_features=gate, expert_features=["a", "b"], max_iter=5).fit(frame, y)
    other = frame.assign(b=0.0, c=0.0)
    assert_allclose(model.gate_proba(other), model.gate_proba(frame))
    assert_allclose(model.predict(frame.assign(c=0.0)), model.predict(frame))
    assert np.abs(model.predict(other) - model.predict(frame)).max() > 0.1


@pytest.mark.parametrize(
    "gate, message",
    [
        (["a"], "only supported for dataframes"),
        ([3], r"gate_features=\[3\]: all features must be in \[0, 2\]"),
        ([True, False, False, True], r"all features must be in \[0, 2\]"),
        ([0.0], "No valid specification"),
        ([[0, 1]], "unhashable"),
    ],
)
def test_columns_that_are_not_there_are_a_value_error(gate: Any, message: str) -> None:
    x, y = three_columns()
    with pytest.raises(ValueError, match=message):
        MixtureOfExpertsRegressor(gate_features=gate).fit(x, y)


@pytest.mark.parametrize(
    "experts",
    [
        Ridge(),
        DecisionTreeRegressor(max_depth=2),
        make_pipeline(StandardScaler(), Ridge()),
        KNeighborsRegressor(5),
        GaussianProcessRegressor(alpha=0.1, optimizer=None),
        [Ridge(), "student_t"],
        [StudentT(3.0), DecisionTreeRegressor(max_depth=2)],
    ],
    ids=lambda experts: str(experts)[:25],
)
def test_estimators_are_experts_whether_they_take_weights_or_not(experts: Any) -> None:
    x, y = problems.two_planes(0)
    model = MixtureOfExpertsRegressor(2, experts=experts, max_iter=15, random_state=0)
    assert model.fit(x, y).score(x, y) > 0.5
    assert len(model.experts_) == 2


class CountingRidge(Ridge):
    """Counts the predictions of all its clones."""

    predictions = 0

    def predict(self, X: Any) -> Any:
        CountingRidge.predictions += 1
        return super().predict(X)


def test_an_estimator_predicts_once_per_step() -> None:
    x, y = problems.two_planes(0)
    start = np.eye(2)[(x[:, 0] > 0).astype(int)]
    model = MixtureOfExpertsRegressor(2, experts=CountingRidge(), start=start, tol=0.0)
    counts = []
    for steps in (5, 15):  # the noise of rows left out takes some more, as often in both
        CountingRidge.predictions = 0
        model.set_params(max_iter=steps).fit(x, y)
        counts.append(CountingRidge.predictions)
    assert counts[1] - counts[0] == 2 * 10
    CountingRidge.predictions = 0
    assert model.responsibilities(x, y).shape == (80, 2) and CountingRidge.predictions == 2


def test_ridge_as_an_estimator_is_the_linear_expert() -> None:
    x, y = problems.two_planes(0)
    x = (x - x.mean(axis=0)) / x.std(axis=0)
    settings: Any = {"max_iter": 5, "tol": 0.0, "expert_penalty": 0.0}
    ours = MixtureOfExpertsRegressor(2, **settings).fit(x, y)
    theirs = MixtureOfExpertsRegressor(2, experts=Ridge(alpha=1e-12), **settings).fit(x, y)
    assert_allclose(ours.predict(x), theirs.predict(x), atol=1e-6)


@pytest.mark.parametrize(
    "experts",
    [LogisticRegression(), DecisionTreeClassifier(max_depth=2), ["logistic", GaussianNB()]],
)
def test_classifiers_are_experts(experts: Any) -> None:
    x, y = problems.crossed(0)
    names = np.array(["left", "right"])[y]
    model = MixtureOfExpertsClassifier(2, experts=experts, max_iter=15).fit(x, names)
    assert model.score(x, names) > 0.75
    assert_allclose(model.predict_proba(x).sum(axis=1), 1)


@pytest.mark.parametrize("experts", [LogisticRegression(), LinearDiscriminantAnalysis()])
def test_a_classifier_whose_rows_have_one_class_always_predicts_it(experts: Any) -> None:
    x, _ = problems.two_planes(0)
    y = np.where(x[:, 0] > 0, "right", np.where(x[:, 1] > 0, "up", "down"))
    gate = PartitionGate(rule=lambda columns: (columns[:, 0] > 0).astype(int))
    model = MixtureOfExpertsClassifier(2, experts=experts, gate=gate, max_iter=3).fit(x, y)
    assert np.array_equal(model.predict_proba(x[x[:, 0] > 0])[:, 1], np.ones(np.sum(x[:, 0] > 0)))
    assert model.score(x, y) > 0.9


def test_an_estimator_that_cannot_be_fitted_is_named() -> None:
    x, y = problems.two_planes(0)
    experts = MultiOutputRegressor(KNeighborsRegressor())
    with pytest.raises(ValueError, match=r"experts=MultiOutputRegressor\(.*sample weights"):
        MixtureOfExpertsRegressor(2, experts=experts).fit(x, np.column_stack([y, y]))


@pytest.mark.parametrize("experts", ["linear", Ridge()])
def test_sparse_rows_are_the_same_as_dense_ones(experts: Any) -> None:
    x, y = problems.two_planes(0)
    x = x * (np.abs(x) > 0.5)
    dense, other = (MixtureOfExpertsRegressor(2, experts=experts, max_iter=5) for _ in range(2))
    other.fit(sparse.csr_array(x), y)
    assert_allclose(other.predict(sparse.csr_array(x)), dense.fit(x, y).predict(x), rtol=1e-4)


def test_only_the_gates_columns_of_sparse_rows_are_made_dense_for_estimators(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    shapes, toarray = [], sparse.csr_array.toarray
    monkeypatch.setattr(sparse.csr_array, "toarray", lambda x: shapes.append(x.shape) or toarray(x))
    x = sparse.random_array((60, 1000), density=0.01, format="csr", random_state=0)
    model = MixtureOfExpertsRegressor(2, experts=Ridge(), gate_features=[0, 1], max_iter=2)
    model.fit(x, np.arange(60.0)).predict(x)
    assert set(shapes) == {(60, 2)}


def test_outputs_are_independent_given_the_expert() -> None:
    x, y = problems.two_planes(0)
    both, start = np.column_stack([y, x[:, 0] - y**2]), np.random.default_rng(0).random((80, 2))
    settings: Any = {"start": start / start.sum(axis=1, keepdims=True), "max_iter": 1}
    model = MixtureOfExpertsRegressor(2, **settings).fit(x, both)
    each = [MixtureOfExpertsRegressor(2, **settings).fit(x, column).experts_ for column in both.T]
    joint = model.gate_proba(x)
    for e, expert in enumerate(model.experts_):
        assert_allclose(expert.coef_, [experts[e].coef_ for experts in each])
        assert_allclose(expert.std_, [experts[e].std_ for experts in each])
        means = np.column_stack([np.ones(80), x]) @ expert.coef_.T
        joint[:, e] *= stats.norm(means, expert.std_).pdf(both).prod(axis=1)
    assert_allclose(model.responsibilities(x, both), joint / joint.sum(axis=1, keepdims=True))


@pytest.mark.parametrize("kind", [MixtureOfExpertsClassifier, HierarchicalMixtureClassifier])
def test_predictions_combine_as_asked(kind: Any) -> None:
    x, y = problems.crossed(0, classes=3)
    model = kind(max_iter=5).fit(x, y)
    gates = model.gate_proba(x)
    each = model._mixture.experts.means(model._rows(x))
    assert_allclose(model.predict_proba(x), np.einsum("ne,neq->nq", gates, each))
    best = each[np.arange(len(x)), gates.argmax(axis=1)]
    assert_allclose(model.set_params(combine="argmax").predict_proba(x), best)
    votes = model.set_params(combine="vote").predict_proba(x)
    for row, gate, chosen in zip(votes, gates, each.argmax(axis=2), strict=True):
        assert_allclose(row, np.bincount(chosen, weights=gate, minlength=3))


@pytest.mark.parametrize("kind, word", [(REGRESSORS[0], "vote"), (REGRESSORS[1], "mean")])
def test_a_word_for_combine_that_is_set_after_the_fit_is_checked(kind: Any, word: str) -> None:
    x, y = problems.two_planes(0)
    model = kind(max_iter=3).fit(x, y).set_params(combine=word)
    with pytest.raises(ValueError, match="The 'combine' parameter"):
        model.predict(x)


def test_a_warm_start_continues_where_the_last_fit_stopped() -> None:
    x, y = problems.two_planes(0)
    whole = MixtureOfExpertsRegressor(max_iter=10, tol=0.0).fit(x, y)
    parts = MixtureOfExpertsRegressor(max_iter=4, tol=0.0, warm_start=True).fit(x, y)
    assert parts.n_iter_ == 4
    assert_allclose(parts.set_params(max_iter=6).fit(x, y).history_, whole.history_)
    assert len(parts.set_params(max_iter=2).fit(x, y, np.full(80, 2)).history_) == 2  # another sum


@pytest.mark.parametrize("experts", [Ridge(), ["linear", Ridge()]])
def test_a_warm_start_of_estimators_continues_where_the_last_fit_stopped(experts: Any) -> None:
    x, y = problems.two_planes(0)
    settings: Any = {"experts": experts, "tol": 0.0}
    whole = MixtureOfExpertsRegressor(max_iter=7, **settings).fit(x, y)
    parts = MixtureOfExpertsRegressor(max_iter=4, warm_start=True, **settings).fit(x, y)
    assert_allclose(parts.set_params(max_iter=3).fit(x, y).history_, whole.history_)
    assert_allclose(parts.expert_std_, whole.expert_std_)


def test_steps_one_at_a_time_converge_where_one_fit_does() -> None:
    x, y = problems.two_planes(0)
    model = MixtureOfExpertsRegressor(max_iter=1, warm_start=True)
    whole = MixtureOfExpertsRegressor().fit(x, y)
    for _ in range(whole.n_iter_):
        assert not getattr(model, "converged_", False)
        model.fit(x, y)
    assert model.converged_
    assert_allclose(model.history_, whole.history_)
    for _ in range(40):  # rises are rounding in the end
        assert model.fit(x, y).converged_


def test_a_warm_start_follows_settings_that_changed() -> None:
    x, y = problems.two_planes(0)
    model = MixtureOfExpertsRegressor(2, warm_start=True).fit(x, y)
    flat = model.set_params(gate_penalty=1e6).fit(x, y)
    assert np.abs(flat.gate_coef_[1, 1:]).max() < 1e-2
    for _ in range(2):  # a larger floor makes another function, whose history continues later
        above = model.set_params(variance_floor=0.5, max_iter=3, tol=0.0).fit(x, y).history_
        assert np.all(np.diff(above) >= 0)
    assert len(above) == 6
    tree = HierarchicalMixtureRegressor((2,), warm_start=True, max_iter=30).fit(x, y)
    gates = [gate.copy() for gate in tree.gate_coef_]
    tree.set_params(growth=3, max_iter=1).fit(x, y)
    assert len(tree.experts_) == 3
    assert_allclose(tree.gate_coef_[0], gates[0], atol=0.2)


@pytest.mark.parametrize(
    "kind, changed",
    [
        (MixtureOfExpertsRegressor, {"n_experts": 3}),
        (MixtureOfExpertsRegressor, {"experts": "student_t"}),
        (MixtureOfExpertsRegressor, {"gate_features": [0]}),
        (MixtureOfExpertsRegressor, {"gate": PartitionGate(centers=np.eye(2))}),
        (HierarchicalMixtureRegressor, {"branching": (2,)}),
        (HierarchicalMixtureRegressor, {"branching": (2, 1), "growth": 3}),
        (HierarchicalMixtureRegressor, {"branching": (4,)}),
    ],
)
def test_a_warm_start_of_another_mixture_is_a_value_error(kind: Any, changed: Any) -> None:
    x, y = problems.two_planes(0)
    model = kind(warm_start=True, max_iter=3).fit(x, y)
    with pytest.raises(ValueError, match="have changed since the last fit: fit again"):
        model.set_params(**changed).fit(x, y)


def test_a_warm_start_with_another_estimator_as_the_expert_is_a_value_error() -> None:
    x, y = problems.two_planes(0)
    model = MixtureOfExpertsRegressor(experts=Ridge(), warm_start=True, max_iter=2).fit(x, y)
    model.set_params(experts=Ridge(2.0)).fit(x, y)
    assert model.experts_[0].alpha == 2.0
    with pytest.raises(ValueError, match="have changed since the last fit"):
        model.set_params(experts=DecisionTreeRegressor()).fit(x, y)


def test_a_tree_that_has_grown_with_a_list_of_experts_is_fitted_again() -> None:
    x, y = problems.two_planes(0)
    experts = ["linear", "student_t"]
    model = HierarchicalMixtureRegressor((2,), growth=4, experts=experts, warm_start=True)
    kinds = [expert.kind for expert in model.set_params(max_iter=5).fit(x, y).experts_]
    first = model.lower_bound_
    assert [expert.kind for expert in model.fit(x, y).experts_] == kinds
    assert len(kinds) == 4 and set(kinds) == set(experts) and model.lower_bound_ > first


def test_a_warm_start_with_other_rows_checks_them() -> None:
    x, y = problems.two_planes(0)
    model = MixtureOfExpertsRegressor(warm_start=True, max_iter=3).fit(x, y)
    for rows, target, message in (
        (x[:, :1], y, "X has 1 features"),
        (x, np.column_stack([y, y]), "y has 2 outputs, expected 1"),
    ):
        with pytest.raises(ValueError, match=message):
            model.fit(rows, target)
    classifier = MixtureOfExpertsClassifier(warm_start=True, max_iter=3).fit(x, y > 0)
    with pytest.raises(ValueError, match="unseen classes"):
        classifier.fit(x, y)


def test_what_does_not_fit_the_mixture_is_refused_after_the_fit() -> None:
    x, y = problems.counts(0)
    model = MixtureOfExpertsRegressor(experts="poisson", max_iter=3).fit(x, y)
    with pytest.raises(ValueError, match="negative"):
        model.responsibilities(x, -y - 1)
    with pytest.raises(ValueError, match="y has 3 outputs, expected 1"):
        model.bic(x, np.column_stack([y, y, y]))
    with pytest.raises(ValueError, match="Negative values in data passed to `sample_weight`"):
        model.aic(x, y, -np.ones(80))
    far = model.predict_dist(1e6 * np.ones((1, 2)))
    assert np.isfinite(far.sample(3, random_state=0)).all()
    for number in (0, "3", 2.5):
        with pytest.raises(ValueError, match=f"n_samples={number!r}"):
            far.sample(number)
    with pytest.raises(ValueError, match="expert_std is not a parameter of poisson experts"):
        model.set_params(start=PARAMETERS).fit(x, y)
    with pytest.raises(ValueError, match="expert_std is not a parameter of logistic experts"):
        MixtureOfExpertsClassifier(start=PARAMETERS).fit(x, y > 1)


@pytest.mark.parametrize("df", ["a", 2, np.nan])
def test_degrees_of_freedom_without_a_variance_are_a_value_error(df: Any) -> None:
    with pytest.raises(ValueError, match="should be a number above 2, or None to estimate it"):
        MixtureOfExpertsRegressor(experts=StudentT(df)).fit(*problems.two_planes(0))


def test_a_search_chooses_degrees_of_freedom_and_the_metric_of_a_partition() -> None:
    x, y = problems.two_planes(0)
    gate = PartitionGate(centers=[[-1.0, 0.0], [1.0, 0.0]])
    model = MixtureOfExpertsRegressor(experts=StudentT(), gate=gate, max_iter=5)
    grid = {"experts__df": [3, None], "gate__metric": ["euclidean", "manhattan"]}
    found = GridSearchCV(model, grid, cv=2, error_score="raise").fit(x, y).best_estimator_
    assert found.experts.get_params()["df"] in (3, None)
    assert model.get_params()["experts__df"] is None and found.gate is not gate
    sizes = [model.set_params(experts__df=df).fit(x, y).experts_[0].df_ for df in (3, 5.5)]
    assert sizes == [3, 5.5]
    assert get_tags(model).input_tags.sparse


def test_degrees_of_freedom_are_estimated_as_by_scipy_and_count_as_parameters() -> None:
    random = np.random.default_rng(0)
    x, noise = random.normal(size=(500, 2)), stats.t(3).rvs(500, random_state=random)
    y, exact = x @ [1, -2] + noise, {"expert_penalty": 0.0, "tol": 1e-9}
    model = MixtureOfExpertsRegressor(1, experts="student_t", **exact).fit(x, y)
    (expert,) = model.experts_
    df, loc, scale = stats.t.fit(y - model.predict(x))
    assert_allclose([expert.df_, expert.std_, 0], [df, scale, loc], rtol=1e-3, atol=1e-3)
    given = MixtureOfExpertsRegressor(1, experts=StudentT(4), **exact).fit(x, y)
    assert model.lower_bound_ > given.lower_bound_ and given.experts_[0].df_ == 4
    more = [m.aic(x, y) + 2 * m.lower_bound_ for m in (model, given)]
    assert more[0] - more[1] == pytest.approx(2)
    assert np.all(np.diff(model.history_) > -1e-9)


def test_the_random_state_determines_random_estimators() -> None:
    x, y = problems.two_planes(0)
    experts = ExtraTreeRegressor(max_depth=3)
    one, other = (
        MixtureOfExpertsRegressor(3, experts=experts, random_state=0).fit(x, y) for _ in range(2)
    )
    assert_allclose(one.predict(x), other.predict(x))
    assert experts.random_state is None


def test_a_row_of_any_form_is_explained_and_pictures_name_the_columns() -> None:
    x, y = problems.two_planes(0)
    frame = DataFrame(x, columns=["length", "width"])
    model = HierarchicalMixtureRegressor(max_iter=5).fit(frame, y)
    expected = str(model.explain(frame.iloc[[3]]))
    assert "length" in expected and str(model.explain(frame.iloc[3])) == expected
    plain = HierarchicalMixtureRegressor(max_iter=5).fit(x, y)
    assert str(plain.explain(sparse.csr_array(x[[3]]))) == str(plain.explain(x[3]))
    texts = [text.get_text() for text in plot_tree(model).texts]
    assert all("length" in text and "width" in text for text in texts) and len(texts) == 4
    with pytest.raises(ValueError, match="feature_names has 1 entries, expected 2"):
        plot_tree(model, feature_names=["a"])
    with pytest.raises(ValueError, match=r"mixture=Ridge\(\): expected an estimator of vmoe"):
        plot_tree(Ridge().fit(x, y))


def test_a_fit_that_failed_leaves_an_estimator_that_is_not_fitted() -> None:
    x, y = problems.two_planes(0)
    model = MixtureOfExpertsRegressor(experts="quadratic")
    with pytest.raises(ValueError, match="quadratic"):
        model.fit(x, y)
    with pytest.raises(NotFittedError):
        model.predict(x)


@pytest.mark.parametrize("kind", [MixtureOfExpertsRegressor, MixtureOfExpertsClassifier])
def test_a_fit_that_fails_leaves_nothing_of_the_fit_before(kind: Any) -> None:
    x, y = problems.inputs(0), np.arange(80) % 5
    model = kind(2, max_iter=3).fit(x, y // 2)
    with pytest.raises(ValueError, match="n_samples=80"):
        model.set_params(n_experts=100).fit(1000 * x + 5, y)
    with pytest.raises(NotFittedError):
        model.predict(x)
    assert not {"n_iter_", "converged_", "history_", "lower_bound_"} & set(vars(model))


def test_a_warm_start_that_fails_leaves_the_fit_before() -> None:
    x, y = problems.two_planes(0)
    model = MixtureOfExpertsRegressor(2, max_iter=3, warm_start=True).fit(x, y)
    before = model.predict(x)
    with pytest.raises(ValueError, match="have changed"):
        model.set_params(n_experts=3).fit(1000 * x + 5, y)
    assert np.array_equal(model.predict(x), before)


def test_the_best_of_several_starts_is_kept() -> None:
    x, y = problems.crossed(1)
    scores = [
        MixtureOfExpertsClassifier(3, n_init=n, random_state=0, max_iter=10).fit(x, y).lower_bound_
        for n in (1, 4)
    ]
    assert scores[1] > scores[0]


def test_a_fit_stops_within_tol_per_row_of_the_limit_in_any_unit_of_the_target() -> None:
    x, y = load_diabetes(return_X_y=True)
    model, scaled = (MixtureOfExpertsRegressor().fit(x, unit * y) for unit in (1, 1e-3))
    assert model.converged_ and model.n_iter_ == scaled.n_iter_
    assert_allclose(1e3 * scaled.predict(x), model.predict(x), rtol=1e-9)
    limit = MixtureOfExpertsRegressor(tol=1e-8).fit(x, y).lower_bound_
    assert 0 < limit - model.lower_bound_ < 1e-5 * len(y)


@pytest.mark.parametrize(
    "mixture",
    [
        MixtureOfExpertsRegressor(),
        MixtureOfExpertsRegressor(experts="student_t"),
        HierarchicalMixtureRegressor((2,)),
    ],
    ids=str,
)
def test_a_start_from_fitted_parameters_stays_there(mixture: Any) -> None:
    x, y = problems.two_planes(0)
    model = clone(mixture).set_params(tol=1e-12, max_iter=1000).fit(x, y)
    start = {
        "gate_coef": model.gate_coef_,
        "expert_coef": [expert.coef_ for expert in model.experts_],
        "expert_std": [expert.std_ for expert in model.experts_],
    }
    if mixture.experts == "student_t":
        start["expert_df"] = [expert.df_ for expert in model.experts_]
    again = clone(mixture).set_params(start=start, max_iter=1).fit(x, y)
    assert again.lower_bound_ == pytest.approx(model.lower_bound_, rel=1e-9)


def test_a_search_finds_the_number_of_experts_in_a_pipeline_of_frames() -> None:
    x, y = problems.two_planes(0, rows=150)
    frame = DataFrame(x, columns=["a", "b"])
    mixture = MixtureOfExpertsRegressor(gate_features=["a"], max_iter=20)
    pipeline = make_pipeline(StandardScaler(), mixture).set_output(transform="pandas")
    grid = {"mixtureofexpertsregressor__n_experts": [1, 2]}
    search = GridSearchCV(pipeline, grid, cv=3).fit(frame, y)
    assert search.best_params_ == {"mixtureofexpertsregressor__n_experts": 2}


def test_criteria_choose_the_number_of_planes() -> None:
    x, y = problems.two_planes(0, rows=200)
    fits = [MixtureOfExpertsRegressor(n, max_iter=50).fit(x, y) for n in (1, 2, 3, 4)]
    for criterion in ("bic", "icl"):
        assert np.argmin([getattr(fit, criterion)(x, y) for fit in fits]) == 1


@pytest.mark.parametrize(
    "settings, message",
    [
        ({"experts": "quadratic"}, "quadratic"),
        ({"experts": "logistic"}, "other task"),
        ({"experts": LogisticRegression()}, "expected a regressor"),
        ({"experts": ["linear"]}, "1 entries, expected 2"),
        ({"experts": ["linear", "poisson"]}, "a count and a density cannot be compared"),
        ({"experts": ["poisson", Ridge()]}, "a count and a density cannot be compared"),
        ({"n_experts": 0}, "n_experts"),
        ({"n_experts": True}, "n_experts=True: expected an integer"),
        ({"n_experts": 100}, "n_samples=80"),
        ({"gate_penalty": -1.0}, "gate_penalty"),
        ({"combine": "vote"}, "combine"),
        ({"start": "nowhere"}, "start"),
        ({"start": np.ones((80, 3)) / 3}, "shape"),
        ({"start": np.ones((80, 2))}, "sum to 1"),
        ({"start": {"gate_coef": np.zeros((2, 3)), "expert_coef": np.zeros((2, 3))}}, "expert_std"),
        ({"start": {"gate_coef": np.zeros((2, 2)), "expert_coef": 0}}, "gate_coef has shape"),
        (
            {"start": {"gate_coef": np.zeros((2, 3)), "expert": 0}},
            r"unknown parameters \['expert'\]",
        ),
        ({"start": {"gate_coef": np.zeros((2, 3))}}, r"lacks the parameters \['expert_coef'\]"),
        ({"start": PARAMETERS | {"expert_coef": np.zeros((3, 2))}}, r"expected \(2, 1, 3\)"),
        ({"start": PARAMETERS | {"expert_std": [0.0, 1.0]}}, "expert_std should be positive"),
        ({"start": PARAMETERS | {"gate_coef": np.full((2, 3), np.nan)}}, "should be finite"),
        ({"start": PARAMETERS | {"expert_df": [3, 3]}}, "expert_df is not a parameter of linear"),
        *(
            ({"experts": experts, "start": PARAMETERS | {"expert_df": df}}, message)
            for experts, df, message in (
                (StudentT(4), [4, 4], "start: expert_df is not a parameter beside df=4"),
                ("student_t", [2, 3], r"expert_df should be in \[2.1, 200\]"),
                ("student_t", [3], r"expert_df has shape \(1,\), expected \(2,\)"),
            )
        ),
        ({"start": np.tile([1.0, 0.0], (80, 1))}, r"experts \[1\] start without any row"),
        ({"experts": "poisson"}, "negative"),
    ],
)
def test_wrong_settings_are_value_errors(settings: dict[str, Any], message: str) -> None:
    x, y = problems.two_planes(0)
    with pytest.raises(ValueError, match=message):
        MixtureOfExpertsRegressor(**settings).fit(x, y)


def test_a_classifier_without_probabilities_and_numbers_beyond_squares_are_value_errors() -> None:
    x, y = problems.two_planes(0)
    with pytest.raises(ValueError, match="expected a classifier with predict_proba"):
        MixtureOfExpertsClassifier(experts=LinearSVC()).fit(x, y > 0)
    with pytest.raises(ValueError, match="y is too large"):
        MixtureOfExpertsRegressor().fit(x, 1e200 * y)
    with pytest.raises(ValueError, match="X is too large"):
        MixtureOfExpertsRegressor().fit(1e160 * x, y)
    with pytest.raises(ValueError, match="growth=3: branching=.* has 4 experts"):
        HierarchicalMixtureRegressor((2, 2), growth=3).fit(x, y)


def test_a_tree_of_more_experts_than_rows_is_refused_before_it_is_built() -> None:
    """The trees would take terabytes."""
    x, y = problems.two_planes(0)
    for branching in ((10**9, 10**9), (10**12, 10**12), (2,) * 70):
        with pytest.raises(ValueError, match="n_samples=80 should be >= the 1[0-9]{17,} experts"):
            HierarchicalMixtureRegressor(branching).fit(x, y)
    for model in (MixtureOfExpertsRegressor(10**12), HierarchicalMixtureRegressor(growth=10**12)):
        with pytest.raises(ValueError, match="n_samples=80 should be >= the 1000000000000 experts"):
            model.fit(x, y)
    fitted = HierarchicalMixtureRegressor(max_iter=1, warm_start=True).fit(x, y)
    with pytest.raises(ValueError, match="their number"):
        fitted.set_params(branching=(10**9, 10**9)).fit(x, y)


def test_weights_are_numbers_of_rows_and_too_few_get_a_warning_or_an_error() -> None:
    x, y = problems.two_planes(0)
    with pytest.warns(UserWarning, match="weights sum to 1, as if .* rows than the 2 experts"):
        MixtureOfExpertsRegressor(max_iter=1).fit(x, y, np.full(80, 0.0125))
    for kind in REGRESSORS:
        with pytest.raises(ValueError, match="weights sum to 8e-19, which is nothing beside a pen"):
            kind(max_iter=1).fit(x, y, np.full(80, 1e-20))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        warnings.simplefilter("ignore", ConvergenceWarning)
        MixtureOfExpertsRegressor(max_iter=1).fit(x, y, np.full(80, 0.03))
        free = MixtureOfExpertsRegressor(max_iter=3, gate_penalty=0.0, expert_penalty=0.0)
        small, ones = (clone(free).fit(x, y, np.full(80, w)).predict(x) for w in (1e-20, 1.0))
    assert_allclose(small, ones, rtol=1e-6)


def test_a_constant_output_has_its_own_unit() -> None:
    x, y = problems.two_planes(0)
    stds = [
        MixtureOfExpertsRegressor(2, max_iter=5).fit(x, np.column_stack([y, constant])).expert_std_
        for constant in (np.full(80, 5e-6), np.full(80, 5.0), np.zeros(80))
    ]
    assert_allclose(stds[1], stds[0] * np.array([1, 1e6]), rtol=1e-9)
    assert_allclose(np.array(stds[2])[:, 1], 0.01)


def test_a_column_far_from_zero_counts_if_its_numbers_differ_by_more_than_rounding() -> None:
    x = 1e9 + 1e-4 * np.linspace(-1, 1, 50)[:, None]
    y = np.abs(x[:, 0] - 1e9)
    assert MixtureOfExpertsRegressor(2).fit(x, y).score(x, y) > 0.9
    rounded = np.full(50, 0.1) * (1 + np.finfo(float).eps * (np.arange(50) % 2))
    model = MixtureOfExpertsRegressor(1, expert_penalty=0.0).fit(rounded[:, None], y)
    assert model.experts_[0].coef_[1] == 0


@pytest.mark.parametrize("outputs", [1, 2])
def test_every_expert_shows_the_size_of_its_noise(outputs: int) -> None:
    x, y = problems.two_planes(0)
    y = y if outputs == 1 else np.column_stack([y, -2 * y])
    settings: Any = {"expert_penalty": 0.0, "max_iter": 5}
    for experts in ("linear", LinearRegression()):
        model = MixtureOfExpertsRegressor(1, experts=experts, **settings).fit(x, y)
        assert_allclose(model.expert_std_[0], model.predict_dist(x).std()[0])
    both = MixtureOfExpertsRegressor(2, experts=[Ridge(), "student_t"], **settings).fit(x, y)
    assert np.shape(both.expert_std_) == ((2,) if outputs == 1 else (2, 2))
    assert_allclose(both.expert_std_[1], both.experts_[1].std_)


UNBOUNDED: dict[str, Any] = {"gate_penalty": 0.0, "expert_penalty": 0.0, "variance_floor": 0.0}


def test_without_penalty_and_floor_an_expert_without_noise_has_a_finite_likelihood() -> None:
    """A variance that is rounding does not move the history, and the expert is named."""
    x, y = np.array([[-1.0], [1], [4], [-2], [-3], [1]]), np.array([0.0, 0, 14, 21, 41, 41])
    settings: Any = {"start": np.eye(2)[[0, 0, 1, 1, 1, 1]], "max_iter": 20}
    model = MixtureOfExpertsRegressor(2, gate_features=[], **settings, **UNBOUNDED)
    with pytest.warns(ConvergenceWarning, match=r"experts \[0\] have the least variance"):
        model.fit(x, y)
    assert np.all(np.diff(model.history_) >= -1e-12 * np.abs(model.history_[1:]))
    found = model.summary(x, y)
    assert found.notes[0].startswith("expert 0: std_ is at its least value")
    assert np.isnan(found.standard_errors[found.names.index(("expert 0", "std_"))])
    assert np.isfinite(found.standard_errors).sum() == 6


class Endless(DummyRegressor):
    """Predicts numbers that have no square."""

    def predict(self, X: Any) -> Any:
        return np.full(len(X), 1e200)


def test_a_likelihood_that_is_not_finite_never_wins_and_is_told() -> None:
    x, y = problems.two_planes(0)
    model = MixtureOfExpertsRegressor(1, experts=Endless(), max_iter=2)
    message = "log-likelihood is .*: the predictions of an expert are too large"
    with pytest.warns(ConvergenceWarning, match=message), np.errstate(all="ignore"):
        assert not model.fit(x, y).converged_


def test_a_row_without_weight_that_no_expert_can_have_made_does_not_count() -> None:
    x, y = np.array([[-1.0], [1], [-1], [1], [3]]), np.array([16.0, 28, 14, 20, 41])
    start, weight = np.eye(2)[[0, 0, 1, 1, 1]], [1, 1, 1, 1, 0]
    model = MixtureOfExpertsRegressor(2, start=start, max_iter=4, gate_features=[], **UNBOUNDED)
    model.fit(x, y, weight)
    assert np.isfinite(model.history_).all() and np.isfinite(model.predict(x)).all()
    assert np.isfinite(model.bic(x, y, weight))


@pytest.mark.parametrize("y", [[1.0, None] * 5, [[1.0, 2.0], [None, 1.0]] * 5])
def test_a_target_that_is_none_is_missing(y: Any) -> None:
    with pytest.raises(ValueError, match="Input y contains NaN"):
        MixtureOfExpertsRegressor().fit(np.arange(10.0)[:, None], y)


def test_a_class_that_is_none_is_missing() -> None:
    for y in (["a", None] * 5, [1, None] * 5):
        with pytest.raises(ValueError, match="Input y contains None"):
            MixtureOfExpertsClassifier().fit(np.arange(10.0)[:, None], y)


def test_methods_before_the_fit_are_not_fitted_errors() -> None:
    model, (x, y) = HierarchicalMixtureRegressor(), problems.two_planes(0)
    for method in ("predict", "gate_proba", "predict_dist", "bootstrap", "explain"):
        with pytest.raises(NotFittedError):
            getattr(model, method)(x)
    scores = ("responsibilities", "aic", "bic", "icl", "log_density", "log_likelihood")
    for method in (*scores, "splits", "summary"):
        with pytest.raises(NotFittedError):
            getattr(model, method)(x, y)
    with pytest.raises(NotFittedError):
        model.to_hard_tree()


@pytest.fixture(scope="module")
def process() -> subprocess.CompletedProcess[str]:
    """A process of its own, since the tests import JAX, and their checks of axes add calls."""
    script = """if True:
        import sys
        import numpy as np
        from vmoe.classic import MixtureOfExpertsRegressor
        x = np.linspace(-1, 1, 20)[:, None]
        model = MixtureOfExpertsRegressor(max_iter=1, warm_start=True)
        model.fit(x, x[:, 0])
        model.set_params(tol=0.0).fit(x, x[:, 0])
        MixtureOfExpertsRegressor(max_iter=1).partial_fit(x, x[:, 0])
        print("jax" in sys.modules)
    """
    command = [sys.executable, "-W", "always", "-c", script]
    return subprocess.run(command, capture_output=True, text=True, check=True)


@pytest.mark.process
def test_a_fit_by_em_imports_no_jax(process: subprocess.CompletedProcess[str]) -> None:
    assert process.stdout == "False\n"


@pytest.mark.process
def test_a_warning_of_no_convergence_names_the_line_of_the_fit(
    process: subprocess.CompletedProcess[str],
) -> None:
    lines = [line.split(":")[:3] for line in process.stderr.splitlines() if "Convergence" in line]
    assert lines == [["<string>", number, " ConvergenceWarning"] for number in ("7", "8", "9")]


def test_missing_values_are_rejected_and_a_pipeline_fills_them() -> None:
    from sklearn.impute import SimpleImputer

    x, y = problems.two_planes(0)
    x[3, 1] = np.nan
    with pytest.raises(ValueError, match="NaN"):
        MixtureOfExpertsRegressor().fit(x, y)
    assert make_pipeline(SimpleImputer(), MixtureOfExpertsRegressor()).fit(x, y).score(x, y) > 0.6
