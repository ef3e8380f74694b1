"""The gradient solver climbs the same log-likelihood as EM, and JAX computes it as NumPy does."""

from typing import Any

import jax
import numpy as np
import pytest
from numpy.testing import assert_allclose
from sklearn.base import clone
from sklearn.tree import DecisionTreeRegressor

from tests.classic import problems
from tests.classic.test_em import EXPERTS, mixture
from vmoe.classic import HierarchicalMixtureRegressor, MixtureOfExpertsRegressor, PartitionGate
from vmoe.classic import gradient as by_gradient
from vmoe.classic.mixture import Mixture
from vmoe.classic.rows import Rows

pytestmark = pytest.mark.filterwarnings("ignore::sklearn.exceptions.ConvergenceWarning")


def objective_by_jax(fitted: Mixture, rows: Rows) -> float:
    """The penalized log-likelihood of weighted rows."""
    with jax.enable_x64(True):
        values = by_gradient.parameters(fitted), by_gradient.data_of(fitted, rows)
        objective = jax.jit(lambda v, data: by_gradient.objective(fitted, v, data))
        return float(objective(*values))


@pytest.mark.long_after(3)
@pytest.mark.parametrize("experts, problem", EXPERTS, ids=lambda value: str(value)[:20])
def test_jax_computes_the_log_likelihood_of_em(experts: Any, problem: Any) -> None:
    x, y = problem(0)
    model = mixture(experts, gate_penalty=0.3, expert_penalty=0.7, max_iter=4).fit(x, y)
    fitted, rows = model._mixture, model._labeled_rows(x, y, np.arange(len(y)) % 3)
    value = objective_by_jax(fitted, rows)
    _, each = fitted.posterior(rows)
    assert value == pytest.approx(rows.weight @ each - fitted.penalty(), rel=1e-12)


@pytest.mark.long_after(2)
@pytest.mark.parametrize("experts, problem", EXPERTS, ids=lambda value: str(value)[:20])
def test_em_stops_where_the_gradient_is_zero(experts: Any, problem: Any) -> None:
    x, y = problem(0)
    settings: Any = {"gate_penalty": 1.0, "expert_penalty": 1.0, "tol": 1e-12, "max_iter": 1000}
    model = mixture(experts, **settings).fit(x, y)
    fitted, rows = model._mixture, model._labeled_rows(x, y)
    with jax.enable_x64(True):
        values, data = by_gradient.parameters(fitted), by_gradient.data_of(fitted, rows)
        gradient = jax.jit(jax.grad(lambda v: by_gradient.objective(fitted, v, data)))(values)
    slopes = jax.tree.map(np.asarray, gradient)
    for slope in jax.tree.leaves((slopes.gates, slopes.experts)):
        assert_allclose(slope, 0, atol=1e-3)
    for kind, slope in zip(by_gradient.parts(fitted), slopes.log_std, strict=True):
        if slope is not None:
            at_floor = kind.std**2 < 1.01 * kind.sizes.floor
            assert_allclose(slope[~at_floor], 0, atol=1e-3)
            assert np.all(slope[at_floor] < 0)


def test_both_solvers_find_the_same_maximum() -> None:
    x, y = problems.two_planes(0)
    em, gradient = (
        MixtureOfExpertsRegressor(2, solver=solver, tol=1e-12, max_iter=2000).fit(x, y)
        for solver in ("em", "gradient")
    )
    assert gradient.lower_bound_ == pytest.approx(em.lower_bound_, rel=1e-8)
    assert_allclose(gradient.predict(x), em.predict(x), atol=1e-4)
    assert np.all(np.diff(gradient.history_) > -1e-9)


@pytest.mark.slow  # JAX compiles the gradient
def test_both_solvers_take_numbers_between_counts() -> None:
    x, y = problems.counts(0)
    em, gradient = (
        MixtureOfExpertsRegressor(1, experts="poisson", solver=solver, tol=1e-9).fit(x, y + 0.5)
        for solver in ("em", "gradient")
    )
    assert gradient.lower_bound_ == pytest.approx(em.lower_bound_, rel=1e-8)


def test_the_gradient_leaves_bounds_where_the_likelihood_rises() -> None:
    """EM starts above: where a clipped parameter has no gradient, it would stay for ever."""
    x, y = problems.two_planes(0)
    model = MixtureOfExpertsRegressor(1, experts="student_t", max_iter=500, tol=1e-9)
    best, floor = model.fit(x, y), 0.01 * y.std()
    start: Any = {"gate_coef": np.zeros((1, 3)), "expert_coef": [best.experts_[0].coef_]}
    start |= {"expert_std": [0.5 * floor], "expert_df": [200]}
    other = clone(model).set_params(start=start, solver="gradient").fit(x, y)
    assert other.lower_bound_ == pytest.approx(best.lower_bound_, abs=1e-4)
    assert other.expert_std_[0] == pytest.approx(best.expert_std_[0], rel=1e-2)


def test_the_gradient_does_not_stop_at_a_single_short_step() -> None:
    x, y = problems.two_planes(4, rows=200)
    model = MixtureOfExpertsRegressor(3, solver="gradient").fit(x, y)
    limit = MixtureOfExpertsRegressor(3, solver="gradient", tol=1e-9, max_iter=2000).fit(x, y)
    assert model.converged_ and limit.lower_bound_ - model.lower_bound_ < 1e-4 * len(y)


def test_a_tree_grows_by_gradient() -> None:
    x, y = problems.two_planes(0)
    settings: Any = {"solver": "gradient", "max_iter": 30}
    small = HierarchicalMixtureRegressor((2,), **settings).fit(x, y)
    grown = HierarchicalMixtureRegressor((2,), growth=3, **settings).fit(x, y)
    assert grown.gate_proba(x).shape == (len(y), 3)
    assert_allclose(grown.history_[: small.n_iter_], small.history_)
    assert grown.lower_bound_ > small.lower_bound_ + 1


def test_a_given_partition_stays_as_it_is() -> None:
    x, y = problems.two_planes(0)
    gate = PartitionGate(rule=lambda columns: (columns[:, 0] > 0).astype(int))
    em, gradient = (
        MixtureOfExpertsRegressor(gate=gate, solver=solver, tol=1e-10).fit(x, y)
        for solver in ("em", "gradient")
    )
    assert_allclose(gradient.gate_proba(x), em.gate_proba(x))
    assert gradient.lower_bound_ == pytest.approx(em.lower_bound_, rel=1e-8)


def test_estimators_have_no_gradient() -> None:
    x, y = problems.two_planes(0)
    model = MixtureOfExpertsRegressor(experts=DecisionTreeRegressor(), solver="gradient")
    with pytest.raises(ValueError, match="named experts"):
        model.fit(x, y)
