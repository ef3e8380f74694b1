"""JAX computes the log-likelihood as NumPy does, and EM stops where its gradient is zero."""

from typing import Any

import jax
import numpy as np
import pytest
from numpy.testing import assert_allclose

from tests.classic import by_jax
from tests.classic.test_em import EXPERTS, mixture

pytestmark = pytest.mark.filterwarnings("ignore::sklearn.exceptions.ConvergenceWarning")


@pytest.mark.long_after(3)
@pytest.mark.parametrize("experts, problem", EXPERTS, ids=lambda value: str(value)[:20])
def test_jax_computes_the_log_likelihood_of_em(experts: Any, problem: Any) -> None:
    x, y = problem(0)
    model = mixture(experts, gate_penalty=0.3, expert_penalty=0.7, max_iter=4).fit(x, y)
    fitted, rows = model._mixture, model._labeled_rows(x, y, np.arange(len(y)) % 3)
    value = by_jax.objective_of(fitted, rows)
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
        values, data = by_jax.parameters(fitted), by_jax.data_of(fitted, rows)
        gradient = jax.jit(jax.grad(lambda v: by_jax.objective(fitted, v, data)))(values)
    slopes = jax.tree.map(np.asarray, gradient)
    for slope in jax.tree.leaves((slopes.gates, slopes.experts)):
        assert_allclose(slope, 0, atol=1e-3)
    for kind, slope in zip(by_jax.parts(fitted), slopes.log_std, strict=True):
        if slope is not None:
            at_floor = kind.std**2 < 1.01 * kind.sizes.floor
            assert_allclose(slope[~at_floor], 0, atol=1e-3)
            assert np.all(slope[at_floor] < 0)
