"""Counts per exposure."""

from typing import Any

import numpy as np
import pytest
from numpy.testing import assert_allclose
from pandas import DataFrame
from scipy import stats
from sklearn.linear_model import PoissonRegressor
from sklearn.model_selection import GridSearchCV
from sklearn.preprocessing import StandardScaler

from tests.classic import problems
from tests.classic.by_jax import objective_of
from vmoe.classic import (
    HierarchicalMixtureRegressor,
    MixtureOfExpertsClassifier,
    MixtureOfExpertsRegressor,
)

pytestmark = pytest.mark.filterwarnings("ignore::sklearn.exceptions.ConvergenceWarning")


def observed(seed: int = 0, rows: int = 120) -> tuple[DataFrame, np.ndarray]:
    """Counts of two rates over different numbers of days."""
    random, x = np.random.default_rng(seed), problems.inputs(seed, rows)
    days = random.uniform(0.2, 20, rows)
    rate = np.exp(np.where(x[:, 0] > 0, 1 + x[:, 1], -x[:, 1]))
    y = random.poisson(rate * days).astype(float)
    return DataFrame({"a": x[:, 0], "b": x[:, 1], "days": days}), y


def poisson(**settings: Any) -> MixtureOfExpertsRegressor:
    return MixtureOfExpertsRegressor(experts="poisson", exposure="days", **settings)


def test_one_expert_is_a_poisson_regression_of_rates_with_exposures_as_weights() -> None:
    frame, y = observed()
    model = poisson(n_experts=1, expert_penalty=0.5, max_iter=1).fit(frame, y)
    z, days = StandardScaler().fit_transform(frame[["a", "b"]]), frame["days"].to_numpy()
    glm = PoissonRegressor(alpha=0.5 / days.sum(), tol=1e-10, max_iter=1000)
    glm.fit(z, y / days, sample_weight=days)
    assert_allclose(model.predict(frame), days * glm.predict(z), rtol=1e-5)


def test_the_mean_of_every_count_is_its_exposure_times_the_rate() -> None:
    """By a loop over rows and experts, for predictions, responsibilities and distributions."""
    frame, y = observed(rows=40)
    model = poisson(max_iter=5).fit(frame, y)
    found, gates = model.predict_dist(frame), model.gate_proba(frame)
    responsibilities = model.responsibilities(frame, y)
    total = 0.0
    for t, (a, b, days) in enumerate(frame.to_numpy()):
        rates = [days * np.exp(expert.coef_ @ [1, a, b]) for expert in model.experts_]
        joint = gates[t] * stats.poisson(rates).pmf(y[t])
        assert_allclose(model.predict(frame.iloc[[t]]), gates[t] @ rates)
        assert_allclose(found.cdf(y)[t], gates[t] @ stats.poisson(rates).cdf(y[t]))
        assert_allclose(responsibilities[t], joint / joint.sum(), atol=1e-12)
        total += np.log(joint.sum())
    assert_allclose(model.bic(frame, y), 9 * np.log(40) - 2 * total)


def test_the_unit_of_the_exposure_moves_the_intercepts_alone() -> None:
    frame, y = observed()
    model, weeks = poisson(max_iter=5), poisson(max_iter=5)
    model.fit(frame, y)
    weeks.fit(frame.assign(days=frame["days"] / 7), y)
    assert_allclose(weeks.history_, model.history_)
    for one, other in zip(weeks.experts_, model.experts_, strict=True):
        assert_allclose(one.coef_, other.coef_ + [np.log(7), 0, 0], atol=1e-6)
    assert not np.allclose(weeks.predict(frame), model.predict(frame))


def test_gate_and_experts_see_the_exposure_only_by_name() -> None:
    frame, y = observed()
    model = poisson(max_iter=3).fit(frame, y)
    longer = frame.assign(days=2 * frame["days"])
    assert_allclose(model.gate_proba(longer), model.gate_proba(frame))
    assert_allclose(model.predict(longer), 2 * model.predict(frame))
    named = poisson(max_iter=3, gate_features=["a", "days"]).fit(frame, y)
    assert named.gate_coef_.shape == (2, 3) and model.experts_[0].coef_.shape == (3,)


def test_a_search_and_a_tree_pass_the_exposure_on() -> None:
    frame, y = observed()
    search = GridSearchCV(poisson(max_iter=5), {"n_experts": [1, 2]}, cv=3).fit(frame, y)
    assert search.best_params_ == {"n_experts": 2}
    tree = HierarchicalMixtureRegressor(experts="poisson", exposure=2, max_iter=5, growth=5)
    tree.fit(frame.to_numpy(), y)
    assert tree.score(frame.to_numpy(), y) > 0.8


@pytest.mark.slow
def test_jax_computes_the_log_likelihood_of_em_with_an_exposure() -> None:
    frame, y = observed()
    model = poisson(max_iter=3).fit(frame, y)
    fitted, rows = model._mixture, model._labeled_rows(frame, y)
    value = objective_of(fitted, rows)
    assert value == pytest.approx(fitted.log_likelihood(rows) - fitted.penalty(), rel=1e-12)


def test_what_is_no_exposure_is_refused() -> None:
    frame, y = observed()
    for kind, settings, target in (
        (MixtureOfExpertsRegressor, {}, y),
        (MixtureOfExpertsClassifier, {}, y > 3),
    ):
        with pytest.raises(ValueError, match="exposure='days': only experts='poisson'"):
            kind(exposure="days", **settings).fit(frame, target)
    with pytest.raises(ValueError, match=r"exposure=\['a', 'days'\]: expected one column"):
        MixtureOfExpertsRegressor(experts="poisson", exposure=["a", "days"]).fit(frame, y)
    with pytest.raises(ValueError, match="exposure='hours'"):
        MixtureOfExpertsRegressor(experts="poisson", exposure="hours").fit(frame, y)
    frame.loc[7, "days"] = 0.0
    with pytest.raises(ValueError, match="exposure: row 7 has 0, expected more than 0"):
        poisson().fit(frame, y)
    model = poisson(warm_start=True, max_iter=1).fit(frame.drop(index=7), np.delete(y, 7))
    with pytest.raises(ValueError, match="have changed since the last fit"):
        model.set_params(exposure="a").fit(frame.drop(index=7), np.delete(y, 7))
