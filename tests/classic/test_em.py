"""What EM guarantees, for every kind of expert that has an exact M-step."""

import itertools
from typing import Any

import numpy as np
import pytest
from numpy.testing import assert_allclose
from sklearn.base import clone
from sklearn.datasets import load_wine
from sklearn.linear_model import Ridge
from sklearn.tree import DecisionTreeRegressor

from tests.classic import problems
from vmoe.classic import (
    HierarchicalMixtureClassifier,
    MixtureOfExpertsClassifier,
    MixtureOfExpertsRegressor,
    StudentT,
)
from vmoe.classic.multinomial import Multinomial

pytestmark = pytest.mark.filterwarnings("ignore::sklearn.exceptions.ConvergenceWarning")

EXPERTS: list[tuple[Any, Any]] = [
    ("linear", problems.two_planes),
    ("student_t", problems.two_planes),
    (StudentT(df=2.5), problems.two_planes),
    ("poisson", problems.counts),
    (["linear", "student_t", "linear"], problems.two_planes),
    ("logistic", problems.crossed),
]


def mixture(experts: Any, **settings: Any) -> Any:
    kind = MixtureOfExpertsClassifier if experts == "logistic" else MixtureOfExpertsRegressor
    return kind(3, experts=experts, **settings)


@pytest.mark.long_after(3)
@pytest.mark.parametrize("experts, problem", EXPERTS, ids=lambda value: str(value)[:20])
def test_the_penalized_log_likelihood_never_falls(experts: Any, problem: Any) -> None:
    random = np.random.default_rng(0)
    for seed in range(12):
        x, y = problem(seed, rows=int(random.integers(20, 90)))
        penalties = random.choice([0.0, 1e-3, 0.1, 10.0], size=2)
        model = mixture(
            experts,
            gate_penalty=penalties[0],
            expert_penalty=penalties[1],
            start=["principal", "random", "kmeans"][seed % 3],
            max_iter=15,
            tol=0.0,
            random_state=seed,
        )
        weight = random.integers(0, 4, size=len(y)) if seed % 2 else None
        history = model.fit(x * random.choice([1e-3, 1.0, 1e3]) + 5, y, weight).history_
        assert np.all(np.diff(history) >= -1e-9 * np.maximum(1, np.abs(history[1:])))
        assert history[-1] > history[0]


@pytest.mark.parametrize("experts, problem", EXPERTS, ids=lambda value: str(value)[:20])
def test_integer_weights_are_repeated_rows(experts: Any, problem: Any) -> None:
    x, y = problem(3)
    weight = np.random.default_rng(0).integers(0, 4, size=len(y))
    weighted = mixture(experts, max_iter=10).fit(x, y, weight)
    repeated = mixture(experts, max_iter=10).fit(x.repeat(weight, axis=0), y.repeat(weight))
    assert_allclose(weighted.history_, repeated.history_, rtol=1e-9)
    assert_allclose(weighted.gate_proba(x), repeated.gate_proba(x), atol=1e-7)


@pytest.mark.parametrize("experts, problem", EXPERTS, ids=lambda value: str(value)[:20])
def test_the_order_of_rows_does_not_matter(experts: Any, problem: Any) -> None:
    x, y = problem(4)
    order = np.random.default_rng(0).permutation(len(y))
    one, other = (mixture(experts, max_iter=10) for _ in range(2))
    assert_allclose(one.fit(x, y).history_, other.fit(x[order], y[order]).history_, rtol=1e-9)


def on_a_grid(kind: Any) -> tuple[np.ndarray, np.ndarray]:
    """Rows whose first two principal directions are equally long."""
    x = np.stack(np.meshgrid(*[np.linspace(-1, 1, 7)] * 2), axis=-1).reshape(-1, 2)
    y = np.abs(x[:, 0])
    return x, y if kind is MixtureOfExpertsRegressor else (y > 0.5).astype(int)


@pytest.mark.parametrize("kind", [MixtureOfExpertsRegressor, MixtureOfExpertsClassifier])
def test_neither_the_order_nor_the_number_of_rows_decides_between_equal_directions(
    kind: Any,
) -> None:
    x, y = on_a_grid(kind)
    one = kind(2, max_iter=20).fit(x, y).gate_proba(x)
    for seed in range(6):
        order = np.random.default_rng(seed).permutation(len(y))
        again = kind(2, max_iter=20).fit(x[order], y[order])
        assert_allclose(again.gate_proba(x), one, atol=1e-6)
    twice = kind(2, max_iter=20, gate_penalty=0.02, expert_penalty=0.02)  # the penalties doubled
    for rows, weight in ((np.repeat(np.arange(49), 2), None), (np.arange(49), np.full(49, 2))):
        assert_allclose(twice.fit(x[rows], y[rows], weight).gate_proba(x), one, atol=1e-6)


@pytest.mark.parametrize("experts", [Ridge(10.0), DecisionTreeRegressor(max_depth=2)])
def test_weights_of_estimators_are_repeated_rows(experts: Any) -> None:
    x, y = problems.two_planes(3)
    weight = np.random.default_rng(0).integers(0, 4, size=len(y))
    settings: Any = {"experts": experts, "max_iter": 5, "random_state": 0}
    weighted = MixtureOfExpertsRegressor(2, **settings).fit(x, y, weight)
    for others in (np.repeat(np.arange(len(y)), weight), np.random.default_rng(1).permutation(80)):
        again = MixtureOfExpertsRegressor(2, **settings)
        again.fit(x[others], y[others], weight[others] if len(others) == 80 else None)
        assert_allclose(again.predict(x), weighted.predict(x), atol=1e-6)


def test_a_target_that_does_not_vary_is_predicted_without_noise_from_rounding() -> None:
    x, _ = problems.two_planes(0)
    for value in (0.1, 1e8 + 0.1, -3.0):
        model = MixtureOfExpertsRegressor(2).fit(x, np.full(80, value))
        assert_allclose(model.predict(x), value)
        assert np.all(np.diff(model.history_) > -1e-6) and model.experts_[0].std_ > 1e-3 * abs(
            value
        )


@pytest.mark.parametrize("experts", ["linear", "student_t"])
def test_the_unit_of_the_target_and_of_the_columns_does_not_matter(experts: str) -> None:
    x, y = problems.two_planes(1)
    model, scaled = (
        MixtureOfExpertsRegressor(2, experts=experts, max_iter=15, tol=0.0) for _ in range(2)
    )
    z = x * [1e3, 1e-3] + 7
    prediction = scaled.fit(z, 100 * y - 50).predict(z)
    assert_allclose(prediction, 100 * model.fit(x, y).predict(x) - 50, rtol=1e-7, atol=1e-5)


def test_one_expert_is_ridge_regression() -> None:
    from sklearn.preprocessing import StandardScaler

    x, y = problems.two_planes(0)
    model = MixtureOfExpertsRegressor(1, expert_penalty=2.0).fit(x, y)
    ridge = Ridge(alpha=2.0).fit(StandardScaler().fit_transform(x), y)
    assert_allclose(model.predict(x), ridge.predict(StandardScaler().fit_transform(x)))


@pytest.mark.parametrize("classes", [2, 3])
def test_one_expert_is_logistic_regression(classes: int) -> None:
    from sklearn.linear_model import LogisticRegression
    from sklearn.preprocessing import StandardScaler

    x, y = problems.crossed(0, classes=classes)
    z = StandardScaler().fit_transform(x)
    model = MixtureOfExpertsClassifier(1, expert_penalty=0.5).fit(x, y)
    penalty = 0.5 if classes > 2 else 0.25  # with two classes, half of the squared log odds' slope
    logistic = LogisticRegression(C=1 / penalty, tol=1e-10, max_iter=1000).fit(z, y)
    assert_allclose(model.predict_proba(x), logistic.predict_proba(z), atol=1e-5)


def test_two_linear_experts_fit_what_no_line_does() -> None:
    x = np.linspace(-1, 1, 100)[:, None]
    model = MixtureOfExpertsRegressor(2).fit(x, np.abs(x[:, 0]))
    assert model.score(x, np.abs(x[:, 0])) > 0.999
    assert model.converged_


def test_two_logistic_experts_fit_what_no_linear_classifier_does() -> None:
    x, y = problems.crossed(0, rows=400)
    model = MixtureOfExpertsClassifier(2, n_init=5, random_state=0).fit(x, y)
    assert model.score(x, y) > 0.9


@pytest.mark.parametrize(
    "model, problem",
    [
        (MixtureOfExpertsRegressor(4, gate_penalty=0.0), problems.two_planes),
        (HierarchicalMixtureClassifier((2, 2)), problems.crossed),
        (MixtureOfExpertsClassifier(3), lambda seed, rows: problems.crossed(seed, rows, classes=3)),
    ],
    ids=lambda value: type(value).__name__,
)
def test_factors_kept_from_step_to_step_lead_where_new_ones_do(model: Any, problem: Any) -> None:
    x, y = problem(0, rows=120)
    whole, steps = (clone(model).set_params(max_iter=n, tol=0.0) for n in (12, 1))
    whole.fit(x, y)
    steps.set_params(warm_start=True)  # each fit copies the mixture without the factors
    for _ in range(12):
        steps.fit(x, y)
    assert_allclose(whole.history_, steps.history_, rtol=1e-10)
    for kept, new in zip(
        np.atleast_3d(whole.gate_coef_), np.atleast_3d(steps.gate_coef_), strict=True
    ):
        assert_allclose(kept, new, atol=1e-9)
    assert_allclose(whole.predict(x), steps.predict(x), atol=1e-9)


def test_a_step_takes_few_evaluations_where_classes_are_separable(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Coefficients grow there without end, by steps of which rounding decides what they gain."""
    evaluate, count = Multinomial.evaluate, itertools.count()

    def counted(function: Multinomial, coef: np.ndarray) -> tuple[float, np.ndarray]:
        next(count)
        return evaluate(function, coef)

    monkeypatch.setattr(Multinomial, "evaluate", counted)
    x, y = load_wine(return_X_y=True)
    HierarchicalMixtureClassifier((2, 2), expert_penalty=1.0, gate_penalty=0.1, max_iter=40).fit(
        x[::2], y[::2]
    )
    regressions = 40 * (4 + 3)  # of four experts and three gates
    assert next(count) < 20 * regressions


def test_outliers_move_student_t_experts_less_than_gaussian_ones() -> None:
    x = np.linspace(-1, 1, 200)[:, None]
    truth = np.abs(x[:, 0])
    y = truth + 0.02 * np.random.default_rng(0).normal(size=200)
    y[::20] += 3
    robust, linear = (
        MixtureOfExpertsRegressor(2, experts=kind).fit(x, y).predict(x)
        for kind in ("student_t", "linear")
    )
    assert np.abs(robust - truth).mean() < 0.3 * np.abs(linear - truth).mean()


def test_a_gate_without_columns_has_constant_probabilities() -> None:
    x, y = problems.two_planes(0)
    gates = MixtureOfExpertsRegressor(2, gate_features=[]).fit(x, y).gate_proba(x)
    assert_allclose(gates, np.broadcast_to(gates[0], gates.shape))
