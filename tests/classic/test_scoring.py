"""Log densities of held-out targets, and what they choose."""

from typing import Any

import numpy as np
import pytest
import sklearn
from numpy.testing import assert_allclose
from scipy import stats
from scipy.special import gammaln, log_softmax, logsumexp
from sklearn.linear_model import LogisticRegression, PoissonRegressor, Ridge
from sklearn.model_selection import GridSearchCV, cross_validate
from sklearn.naive_bayes import GaussianNB
from sklearn.pipeline import Pipeline, make_pipeline
from sklearn.preprocessing import StandardScaler

from tests.classic import problems
from tests.classic.test_predictive import two_valued
from vmoe.classic import (
    HierarchicalMixtureClassifier,
    LogLikelihoodScorer,
    MixtureOfExpertsClassifier,
    MixtureOfExpertsRegressor,
    StudentT,
)

pytestmark = pytest.mark.filterwarnings("ignore::sklearn.exceptions.ConvergenceWarning")


def test_of_a_two_valued_target_r2_sees_nothing_and_the_log_likelihood_chooses_two() -> None:
    x, y = two_valued()
    y = y - x[:, 0]
    grid, scoring = {"mixture__n_experts": [1, 2, 3]}, {"r2": "r2", "log": LogLikelihoodScorer()}
    mixture = MixtureOfExpertsRegressor(random_state=0)
    pipeline = Pipeline([("scaled", StandardScaler()), ("mixture", mixture)])
    search = GridSearchCV(pipeline, grid, scoring=scoring, refit="log", cv=3)
    order = np.random.default_rng(1).permutation(len(y))
    found = search.fit(x[order], y[order]).cv_results_
    assert_allclose(found["mean_test_r2"], 0, atol=0.1)
    assert search.best_params_ == {"mixture__n_experts": 2}
    assert found["mean_test_log"][1] > found["mean_test_log"][0] + 1


@pytest.mark.parametrize(
    "experts", ["linear", StudentT(3.0), "poisson", ["linear", "student_t"], Ridge()]
)
def test_the_log_density_of_a_row_is_that_of_a_loop_over_experts(experts: Any) -> None:
    x, y = problems.counts(0)
    targets = y if experts == "poisson" else np.column_stack([y, x[:, 0] - y])
    model = MixtureOfExpertsRegressor(2, experts=experts, max_iter=4).fit(x, targets)
    found, gates = model.log_density(x, targets), model.gate_proba(x)
    assert_allclose(model.predict_dist(x).logpdf(targets), found, rtol=1e-10)
    assert_allclose(model.predict_dist(x).pdf(targets), np.exp(found), rtol=1e-10)
    for t in range(0, len(x), 7):
        density = 0.0
        for gate, expert in zip(gates[t], model.experts_, strict=True):
            if isinstance(expert, Ridge):
                return  # its standard deviation is not public
            predictor = np.atleast_2d(expert.coef_) @ np.r_[1, x[t]]
            if expert.kind == "poisson":
                each = stats.poisson.pmf(targets[t], np.exp(predictor))
            elif expert.kind == "linear":
                each = stats.norm.pdf(targets[t], predictor, expert.std_)
            else:
                each = stats.t.pdf(targets[t], expert.df_, predictor, expert.std_)
            density += gate * np.prod(each)
        assert found[t] == pytest.approx(np.log(density), rel=1e-9)


def test_the_density_of_one_number_is_that_of_every_row() -> None:
    x, y = problems.two_planes(0)
    found = MixtureOfExpertsRegressor(2, max_iter=3).fit(x, y).predict_dist(x)
    assert_allclose(found.logpdf(0.5), found.logpdf(np.full(len(y), 0.5)))
    grid = np.linspace(-10, 10, 501)
    density = np.array([found.pdf(value)[:3] for value in grid])
    assert_allclose(np.trapezoid(density, grid, axis=0), 1, rtol=1e-5)


def test_a_target_far_from_every_expert_keeps_its_log_density() -> None:
    x, y = problems.two_planes(0)
    start: Any = {
        "gate_coef": [[0, 0, 0], [0, 2000, 0]],
        "expert_coef": [[0, 0, 0], [9e3, 0, 0]],
        "expert_std": [1.0, 1.0],
    }
    model = MixtureOfExpertsRegressor(2).fit(x, y)
    model._set_parameters(model._mixture, model._view, **start)
    far = np.array([[-1.0, 0.0]])  # whose gate is 0 by rounding where the target is probable
    assert model.gate_proba(far)[0, 1] == 0
    expected = -2000 - 0.5 * np.log(2 * np.pi)
    assert_allclose(model.predict_dist(far).logpdf([9e3]), expected)
    assert_allclose(model.log_density(far, [9e3]), expected)


@pytest.mark.parametrize("kind", [MixtureOfExpertsClassifier, HierarchicalMixtureClassifier])
def test_the_log_probability_of_a_class_is_finite_wherever_a_log_softmax_is(kind: Any) -> None:
    x, y = problems.crossed(0, classes=3)
    model = kind(max_iter=5).fit(x, np.array(["a", "b", "c"])[y])
    far = np.vstack([x, 1e4 * x[:5]])
    assert np.any(model.predict_proba(far) == 0)
    rows = model._rows(far)
    each = log_softmax(np.einsum("np,ekp->nek", rows.expert, model._mixture.experts.coef), axis=2)
    prior = model._mixture.tree.log_prior(rows)[:, :, None]
    with np.errstate(divide="ignore"):
        assert_allclose(model.predict_log_proba(far), logsumexp(prior + each, axis=1))
        assert np.isfinite(model.predict_log_proba(far)).all()
        for combine in ("argmax", "vote"):
            model.set_params(combine=combine)
            log_p = model.predict_log_proba(far)
            assert_allclose(np.exp(log_p), model.predict_proba(far), atol=1e-14)
            assert np.isfinite(log_p).all() == (combine == "argmax")
    samples = model.log_density(x, model.classes_[y])
    whole = model.set_params(combine="weighted").predict_log_proba(x)
    assert_allclose(samples, whole[np.arange(len(y)), y])


@pytest.mark.parametrize("experts", [LogisticRegression(), ["logistic", GaussianNB()]])
def test_the_log_probability_of_estimators_is_the_logarithm_of_the_probability(
    experts: Any,
) -> None:
    x, y = problems.crossed(0)
    model = MixtureOfExpertsClassifier(2, experts=experts, max_iter=3).fit(x, y)
    assert_allclose(np.exp(model.predict_log_proba(x)), model.predict_proba(x))


def test_weights_of_a_score_are_repeated_rows() -> None:
    x, y = problems.two_planes(0)
    weight, scorer = np.arange(80) % 3, LogLikelihoodScorer()
    model = MixtureOfExpertsRegressor(2, max_iter=3).fit(x, y)
    many = model.log_likelihood(x.repeat(weight, axis=0), y.repeat(weight))
    assert model.log_likelihood(x, y, weight) == pytest.approx(many)
    assert scorer(model, x, y, sample_weight=weight) == pytest.approx(many / weight.sum())
    assert scorer(model, x, y, sample_weight=2) == pytest.approx(scorer(model, x, y))
    pipeline = make_pipeline(StandardScaler(), MixtureOfExpertsRegressor(2, max_iter=3)).fit(x, y)
    assert scorer(make_pipeline(pipeline), x, y) == pytest.approx(scorer(model, x, y))


def test_a_search_passes_weights_to_the_score_where_they_are_asked_for() -> None:
    x, y = problems.two_planes(0)
    weight = np.arange(80) % 3 + 1.0
    folds = [(np.arange(40), np.arange(40, 80))]
    with sklearn.config_context(enable_metadata_routing=True):
        model = MixtureOfExpertsRegressor(2, max_iter=3).set_fit_request(sample_weight=True)
        scorer = LogLikelihoodScorer().set_score_request(sample_weight=True)
        found = cross_validate(
            model, x, y, scoring=scorer, cv=folds, params={"sample_weight": weight}
        )
    model.fit(x[:40], y[:40], weight[:40])
    expected = model.log_likelihood(x[40:], y[40:], weight[40:]) / weight[40:].sum()
    assert found["test_score"] == pytest.approx([expected])


def test_an_estimator_without_a_density_is_named() -> None:
    x, y = problems.two_planes(0)
    with pytest.raises(ValueError, match=r"estimator=Ridge\(\): LogLikelihoodScorer needs a mix"):
        LogLikelihoodScorer()(make_pipeline(StandardScaler(), Ridge()).fit(x, y), x, y)


def test_a_search_is_scored_by_its_best_mixture() -> None:
    x, y = two_valued(80)
    search = GridSearchCV(
        MixtureOfExpertsRegressor(max_iter=1000),
        {"n_experts": [1, 2]},
        scoring=LogLikelihoodScorer(),
        cv=2,
    ).fit(x, y)
    score = LogLikelihoodScorer()
    assert score(search, x, y) == score(search.best_estimator_, x, y)


def test_a_number_between_counts_has_a_quasi_likelihood_and_no_probability() -> None:
    x, y = problems.counts(0)
    model = MixtureOfExpertsRegressor(1, experts="poisson").fit(x, y + 0.5)
    rate = model.predict(x)
    expected = (y + 0.5) * np.log(rate) - rate - gammaln(y + 1.5)
    assert_allclose(model.log_density(x, y + 0.5), expected)
    theirs = PoissonRegressor(alpha=0.0, tol=1e-9).fit(x, y + 0.5)
    assert_allclose(rate, theirs.predict(x), rtol=0.02)
    assert np.isneginf(model.predict_dist(x).logpdf(y + 0.5)).all()
