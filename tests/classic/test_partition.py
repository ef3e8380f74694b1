"""Tasks decomposed by hand: a fixed partition as the gate."""

from typing import Any

import numpy as np
import pytest
from numpy.testing import assert_allclose
from sklearn.base import clone
from sklearn.gaussian_process import GaussianProcessRegressor
from sklearn.linear_model import LinearRegression

from tests.classic import problems
from vmoe.classic import MixtureOfExpertsRegressor, PartitionGate, plot_tree


def left(columns: np.ndarray) -> np.ndarray:
    return (columns[:, 0] > 0).astype(int)


PARTITIONS = [
    PartitionGate(rule=left),
    PartitionGate(centers=[[-1.0], [1.0]]),
    PartitionGate(centers=[[-1.0], [1.0]], metric="manhattan"),
    PartitionGate(groups=[[[-2.0], [-1.0]], [[1.0], [2.0]]]),
]


@pytest.mark.parametrize("gate", PARTITIONS, ids=["rule", "centers", "metric", "groups"])
def test_each_expert_is_the_regression_of_its_part(gate: PartitionGate) -> None:
    random = np.random.default_rng(0)
    x = np.column_stack([random.choice([-2.0, -1.0, 1.0, 2.0], 100), random.normal(size=100)])
    y = np.where(x[:, 0] > 0, x[:, 1], 3 - x[:, 1]) + 0.1 * random.normal(size=100)
    model = MixtureOfExpertsRegressor(2, gate=gate, gate_features=[0], expert_penalty=0.0)
    model.fit(x, y)
    for part in (x[:, 0] > 0, x[:, 0] < 0):
        assert_allclose(
            model.predict(x[part]), LinearRegression().fit(x[part], y[part]).predict(x[part])
        )
    assert set(np.unique(model.gate_proba(x))) == {0.0, 1.0}


def test_a_gaussian_process_in_a_part_is_fitted_to_this_part_alone() -> None:
    x, y = problems.two_planes(0)
    process = GaussianProcessRegressor(alpha=0.5, optimizer=None)
    model = MixtureOfExpertsRegressor(2, experts=process, gate=PartitionGate(rule=left)).fit(x, y)
    here = x[:, 0] > 0
    expected = clone(process).fit(x[here], y[here]).predict(x[here])
    assert_allclose(model.predict(x[here]), expected)


def test_what_explains_coefficients_is_refused_for_a_rule() -> None:
    x, y = problems.two_planes(0)
    model = MixtureOfExpertsRegressor(2, gate=PartitionGate(rule=left)).fit(x, y)
    for call in (lambda: model.explain(x[0]), lambda: model.splits(x, y), lambda: plot_tree(model)):
        with pytest.raises(ValueError, match=r"PartitionGate\(rule=.*is a rule"):
            call()
    assert not hasattr(model, "gate_coef_")


@pytest.mark.parametrize(
    "gate, message",
    [
        (PartitionGate(centers=[[-1.0], [0.0], [1.0]]), "has 3 entries, expected 2"),
        (PartitionGate(groups=[[[1.0]]]), "has 1 entries, expected 2"),
        (PartitionGate(centers=3), r"PartitionGate\(centers=3\): expected an entry for each of"),
        (PartitionGate(centers=[[0.0], [99.0]]), r"experts \[1\] start without any row"),
    ],
)
def test_an_expert_without_rows_is_a_value_error(gate: PartitionGate, message: str) -> None:
    x = np.linspace(-1, 1, 10)[:, None]
    with pytest.raises(ValueError, match=message):
        MixtureOfExpertsRegressor(2, gate=gate).fit(x, x[:, 0])


def test_a_partition_shows_its_metric_unless_it_is_the_usual_one() -> None:
    shown = [repr(PartitionGate(centers=[[0], [1]], metric=m)) for m in ("euclidean", "cosine")]
    assert shown[0] == "PartitionGate(centers=[[0], [1]])"
    assert shown[1] == "PartitionGate(centers=[[0], [1]], metric='cosine')"


def test_a_rule_is_a_function() -> None:
    with pytest.raises(ValueError, match="rule=3 should be a function"):
        MixtureOfExpertsRegressor(gate=PartitionGate(rule=3)).fit(*problems.two_planes(0))


@pytest.mark.parametrize("settings", [{}, {"centers": [[0.0]], "rule": left}])
def test_a_partition_has_exactly_one_rule(settings: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match="exactly one"):
        MixtureOfExpertsRegressor(gate=PartitionGate(**settings)).fit(*problems.two_planes(0))


@pytest.mark.parametrize(
    "rule, message",
    [(lambda x: x[:, 0], "an integer"), (lambda x: np.full(len(x), 2), r"\[0, 2\)")],
)
def test_a_rule_without_experts_is_a_value_error(rule: Any, message: str) -> None:
    x = np.linspace(-1, 1, 10)[:, None]
    with pytest.raises(ValueError, match=message):
        MixtureOfExpertsRegressor(2, gate=PartitionGate(rule=rule)).fit(x, x[:, 0])
