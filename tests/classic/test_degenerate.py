"""Experts that a mixture has for nothing."""

import numpy as np
import pytest
from sklearn.exceptions import ConvergenceWarning

from tests.classic import problems
from vmoe.classic import (
    HierarchicalMixtureRegressor,
    MixtureOfExpertsClassifier,
    MixtureOfExpertsRegressor,
    PartitionGate,
)

pytestmark = pytest.mark.filterwarnings("ignore::sklearn.exceptions.ConvergenceWarning")


def three_values() -> tuple[np.ndarray, np.ndarray]:
    """A target of three values and an input of two, which cannot tell eight experts apart."""
    random = np.random.default_rng(0)
    return random.integers(0, 2, (300, 1)).astype(float), random.integers(0, 3, 300).astype(float)


def test_experts_with_the_coefficients_of_others_are_named() -> None:
    x, y = three_values()
    model = MixtureOfExpertsRegressor(8, max_iter=50)
    with pytest.warns(ConvergenceWarning, match=r"experts \[.*\] are copies of others: use fewer"):
        model.fit(x, y)
    copies = model.degenerate_experts(x, y).copies
    coefs = [expert.coef_ for expert in model.experts_]
    assert len(copies) == 3 == 8 - len(np.unique(np.round(coefs, 6), axis=0))
    classes = MixtureOfExpertsClassifier(12, max_iter=5)
    with pytest.warns(ConvergenceWarning, match="copies of others"):
        classes.fit(x, y)


def test_experts_without_rows_are_named() -> None:
    x, y = problems.two_planes(0)
    gate = PartitionGate(rule=lambda columns: (columns[:, 0] > 0).astype(int))
    model = MixtureOfExpertsRegressor(2, gate=gate).fit(x, y)
    right = x[:, 0] > 0
    assert model.degenerate_experts(x[right], y[right]).empty == [0]
    assert model.degenerate_experts(x, y, right).empty == [0]
    assert model.degenerate_experts(x, y).empty == []


@pytest.mark.parametrize("floor", [1e-4, 0.0])
def test_experts_at_the_bound_on_the_variance_are_named(floor: float) -> None:
    x = np.linspace(-1, 1, 60)[:, None]
    y = np.where(x[:, 0] < 0, x[:, 0], 5 + np.random.default_rng(0).normal(size=60))
    penalties = {"gate_penalty": 0.0, "expert_penalty": 0.0}
    model = HierarchicalMixtureRegressor((2,), variance_floor=floor, **penalties)
    with pytest.warns(ConvergenceWarning, match=r"experts \[\d\] have the least variance") as found:
        model.fit(x, y)
    (expert,) = model.degenerate_experts(x, y).at_floor
    stds = [float(each.std_) for each in model.experts_]
    assert expert == int(np.argmin(stds)) and stds[1 - expert] > 0.5
    assert all(str(warning.message).count("\n") == 0 for warning in found)
