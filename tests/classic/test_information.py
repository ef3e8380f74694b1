"""Errors of parameters: by the observed information, and by a bootstrap."""

import copy
import dataclasses
from typing import Any

import jax
import numpy as np
import pytest
from jax.flatten_util import ravel_pytree
from numpy.testing import assert_allclose
from pandas import DataFrame
from scipy import stats
from sklearn.linear_model import LinearRegression, Ridge

from tests.classic import by_jax, problems
from tests.classic.test_em import EXPERTS, mixture
from vmoe.classic import (
    HierarchicalMixtureClassifier,
    HierarchicalMixtureRegressor,
    MixtureOfExpertsClassifier,
    MixtureOfExpertsRegressor,
    PartitionGate,
    StudentT,
)
from vmoe.classic.experts.estimators import Estimators
from vmoe.classic.information import derivatives
from vmoe.classic.mixture import Mixture, parts
from vmoe.classic.tree import breadth_first

pytestmark = pytest.mark.filterwarnings("ignore::sklearn.exceptions.ConvergenceWarning")
LIMIT: dict[str, Any] = {"tol": 1e-10, "max_iter": 2000}
PENALTIES: dict[str, Any] = {"gate_penalty": 0.3, "expert_penalty": 0.7}


def moved(mixture: Mixture, number: int, step: float) -> Mixture:
    """A mixture whose parameter of this number is moved; the logarithm, if it is positive."""
    result = copy.deepcopy(mixture)
    views = [gate.coef[1:] for gate in breadth_first(result.tree)]
    for kind in parts(result):
        if isinstance(kind, Estimators):
            continue
        for e, coef in enumerate(kind.coef):
            views += [coef[1:] if kind.classifies else coef]
            views += [kind.std[e]] if hasattr(kind, "std") else []
            views += [kind.df_[e : e + 1]] if getattr(kind, "df", 0) is None else []
    for view in views:
        if number < view.size:
            at = np.unravel_index(number, view.shape)
            view[at] = view[at] * np.exp(step) if view.ndim == 1 else view[at] + step
            return result
        number -= view.size
    raise AssertionError("there are fewer parameters")


def fitted(experts: Any, problem: Any, form: str) -> tuple[Any, Any]:
    """A mixture before its limit, and rows with weights, which may be in groups."""
    x, y = problem(0)
    groups = np.random.default_rng(0).permutation(len(y)) % 30 if form == "groups" else None
    if form == "tree":
        classify = experts == "logistic"
        kind = HierarchicalMixtureClassifier if classify else HierarchicalMixtureRegressor
        size = (len(experts),) if isinstance(experts, list) else (2, 2)
        model: Any = kind(size, experts=experts, max_iter=4, **PENALTIES)
    else:
        model = mixture(experts, max_iter=4, **PENALTIES)
    if form == "groups":
        x[:, 0] = x[groups, 0]
        model.set_params(gate_features=[0])
    y = np.column_stack([y, x[:, 0] * y]) if experts == "student_t" else y
    y = (y + problems.inputs(1)[:, 0] > 1.5) + y if experts == "logistic" else y
    return model.fit(x, y), model._labeled_rows(x, y, np.arange(len(y)) % 3, groups)


@pytest.mark.parametrize("form", ["rows", "groups", pytest.param("tree", marks=pytest.mark.slow)])
@pytest.mark.parametrize(
    "experts, problem",
    [*EXPERTS, (["linear", LinearRegression(), "student_t"], problems.two_planes)],
    ids=lambda value: str(value)[:20],
)
def test_the_information_is_how_the_log_likelihood_curves(
    experts: Any, problem: Any, form: str
) -> None:
    model, rows = fitted(experts, problem, form)
    own, step = model._mixture, 1e-5
    gradient, information = derivatives(own, rows)

    def value(mixture: Mixture) -> float:
        return mixture.log_likelihood(rows) - mixture.penalty()

    slopes, curves = [], []
    for number in range(len(gradient)):
        up, down = moved(own, number, step), moved(own, number, -step)
        slopes.append((value(up) - value(down)) / (2 * step))
        curves.append((derivatives(down, rows)[0] - derivatives(up, rows)[0]) / (2 * step))
    assert_allclose(gradient, slopes, atol=1e-6 * np.abs(slopes).max())
    assert_allclose(information, curves, atol=1e-7 * np.abs(curves).max())


def test_the_information_of_many_rows_is_the_sum_of_that_of_parts() -> None:
    x = problems.inputs(0, 1300, columns=20)  # more rows than are computed at once
    y = x[:, 0] * x[:, 1]
    settings: Any = {"gate_penalty": 0.0, "expert_penalty": 0.0, "max_iter": 2}
    model = MixtureOfExpertsRegressor(8, **settings).fit(x, y)
    whole, *halves = (
        derivatives(model._mixture, model._labeled_rows(x[part], y[part]))
        for part in (slice(None), slice(500), slice(500, None))
    )
    for sums, first, second in zip(whole, *halves, strict=True):
        assert_allclose(sums, first + second, atol=1e-12 * np.abs(sums).max())


@pytest.mark.slow
@pytest.mark.parametrize("form", ["rows", "groups"])
@pytest.mark.parametrize("experts, problem", EXPERTS, ids=lambda value: str(value)[:20])
def test_the_information_is_the_hessian_by_jax(experts: Any, problem: Any, form: str) -> None:
    model, rows = fitted(experts, problem, form)
    own = model._mixture
    with jax.enable_x64(True):
        flat, unravel = ravel_pytree(by_jax.parameters(own))
        data = by_jax.data_of(own, rows)
        hessian = jax.jit(jax.hessian(lambda v: by_jax.objective(own, unravel(v), data)))
        numbers = jax.tree.map(np.asarray, unravel(np.arange(len(flat), dtype=float)))
        found = np.asarray(hessian(flat))
    order = [gate.ravel() for gate in numbers.gates]
    for kind, coefs, *positive in by_jax.each_part(own, numbers):
        for e, coef in enumerate(coefs):
            order += [coef[1:].ravel() if kind.classifies else coef.ravel()]
            order += [np.ravel(each[e]) for each in positive if each is not None]
    at = np.concatenate(order).astype(int)
    _, information = derivatives(own, rows)
    assert_allclose(information, -found[np.ix_(at, at)], atol=1e-12 * np.abs(found).max())


def test_one_linear_expert_has_the_errors_of_least_squares() -> None:
    x, y = problems.two_planes(0)
    x = x * [1.0, 100.0] + [5.0, 0.0]
    model = MixtureOfExpertsRegressor(1, expert_penalty=0.0).fit(x, y)
    columns = np.column_stack([np.ones(len(x)), x])
    variance = np.mean((y - LinearRegression().fit(x, y).predict(x)) ** 2)
    found = model.summary(x, y)
    assert found.names == [("expert 0", name) for name in ("(intercept)", "x0", "x1", "std_")]
    expected = variance * np.linalg.inv(columns.T @ columns)
    assert_allclose(found.covariance[:3, :3], expected, rtol=1e-8)
    assert_allclose(found.standard_errors[3], np.sqrt(variance / (2 * len(x))), rtol=1e-8)
    assert_allclose(found.estimates[:3], model.experts_[0].coef_)
    assert_allclose(found.z_values[:3], found.estimates[:3] / np.sqrt(np.diag(expected)))
    assert_allclose(found.p_values[:3], 2 * stats.norm.cdf(-np.abs(found.z_values[:3])))
    low, high = found.interval(0.9)[0]
    assert_allclose(
        [low, high], stats.norm.interval(0.9, found.estimates[0], expected[0, 0] ** 0.5)
    )


@pytest.mark.slow
def test_intervals_of_a_gate_hold_the_truth_as_often_as_they_say() -> None:
    z = []
    for seed in range(40):
        random = np.random.default_rng(seed)
        x = random.normal(size=(300, 1))
        second = random.random(300) < 1 / (1 + np.exp(-1.5 * x[:, 0]))
        y = np.where(second, -1 - x[:, 0], 1 + x[:, 0]) + random.normal(size=300)
        start: Any = {"gate_coef": [[0, 0], [0, 1.5]], "expert_std": [1, 1]}
        start["expert_coef"] = [[1, 1], [-1, -1]]
        model = HierarchicalMixtureRegressor(
            (2,), gate_penalty=0.0, expert_penalty=0.0, start=start, tol=1e-7
        ).set_params(max_iter=500)
        (split,) = model.fit(x, y).splits(x, y)
        errors = np.sqrt(np.diag(split.covariance))
        z.append((model.gate_coef_[0][1] - [0, 1.5]) / errors)
    assert np.mean(np.abs(z) < 1.96) > 0.88  # 0.95 is nominal; known experts made it 0.7
    assert 0.8 < np.std(z) < 1.3


def test_integer_weights_are_repeated_rows_and_columns_have_their_names() -> None:
    x, y = problems.two_planes(0)
    frame, weight = DataFrame(x, columns=["width", "height"]), np.arange(80) % 3 + 1
    model = HierarchicalMixtureRegressor(gate_features=["height"], **PENALTIES, **LIMIT)
    model.fit(frame, y, weight)
    found = model.summary(frame, y, weight)
    many = model.summary(frame.loc[frame.index.repeat(weight)], y.repeat(weight))
    assert_allclose(found.covariance, many.covariance, rtol=1e-7)
    assert found.names[:3] == [
        ("gate 0", "gate 2: (intercept)"),
        ("gate 0", "gate 2: height"),
        ("gate 1", "expert 1: (intercept)"),
    ]
    assert found.names[-4:] == [
        ("expert 3", name) for name in ("(intercept)", "width", "height", "std_")
    ]
    assert_allclose(found.estimates[-4:-1], model.experts_[3].coef_)
    lines = str(found).splitlines()
    (line,) = [line for line in lines if line.startswith("  gate 2: height")]
    error = np.sqrt(found.covariance[1, 1])
    assert line.split()[3:5] == [f"{found.estimates[1]:.4g}", f"{error:.4g}"]
    assert "std. error" in lines[2] and lines[2].startswith("gate 0")


def test_names_tell_classes_and_outputs_apart() -> None:
    x, y = problems.crossed(0, classes=3)
    classes = np.array(["a", "b", "c"])[y]
    for targets, lines in ((classes, ["class b: ", "class c: "]), (classes == "a", [""])):
        model = MixtureOfExpertsClassifier(**PENALTIES).fit(x, targets)
        found = model.summary(x, targets)
        expected = [line + name for line in lines for name in ("(intercept)", "x0", "x1")]
        assert [name for part, name in found.names if part == "expert 1"] == expected
        own = [
            value
            for (part, _), value in zip(found.names, found.estimates, strict=True)
            if part == "expert 1"
        ]
        assert_allclose(own, np.atleast_2d(model.experts_[1].coef_)[-len(lines) :].ravel())
    both = np.column_stack([y, x[:, 0]])
    found = MixtureOfExpertsRegressor(1, **PENALTIES).fit(x, both).summary(x, both)
    assert found.names[-3:] == [("expert 0", name) for name in ("y1: x1", "y0: std_", "y1: std_")]


def test_a_standard_deviation_at_its_least_value_has_no_error_and_a_note() -> None:
    x = np.linspace(-1, 1, 60)[:, None]
    y = np.where(np.arange(60) % 2, 3.0, x[:, 0] + np.random.default_rng(0).normal(size=60))
    model = MixtureOfExpertsRegressor(2, gate_features=[], **PENALTIES, **LIMIT).fit(x, y)
    (floor,) = [e for e in (0, 1) if model.experts_[e].std_ < 0.02]
    found = model.summary(x, y)
    assert [
        name for name, e in zip(found.names, found.standard_errors, strict=True) if np.isnan(e)
    ] == [(f"expert {floor}", "std_")]
    (note,) = found.notes
    assert note.startswith(f"expert {floor}: std_ is at its least value") and note in str(found)


def test_what_rows_do_not_determine_has_no_error_and_a_note() -> None:
    x, y = problems.two_planes(0)
    known = MixtureOfExpertsRegressor(1, expert_penalty=0.0, **LIMIT)
    twice = np.column_stack([x, x[:, 0]])
    found = known.fit(twice, y).summary(twice, y)
    assert np.array_equal(np.isnan(found.standard_errors), [True, True, False, True, False])
    (note,) = found.notes
    assert note.startswith("expert 0: these rows do not determine 2 of its 5 parameters")
    side = x[:, 0] > 0  # without a penalty, the gate has no maximum
    settings: Any = {"gate_penalty": 0.0, "expert_penalty": 0.0, **LIMIT}
    apart = np.where(side, 20.0, -20.0) + x[:, 1] + problems.inputs(5, columns=1)[:, 0]
    model = MixtureOfExpertsRegressor(2, **settings).fit(x, apart)
    found = model.summary(x, apart)
    assert np.isnan(found.standard_errors[:3]).all()
    assert np.isfinite(found.standard_errors[3:]).all()
    (note,) = found.notes
    assert note.startswith("gate: these rows do not determine") and "separable" in note
    with pytest.warns(UserWarning, match="covariance: gate: these rows do not determine"):
        (split,) = model.splits(x, apart)
    assert np.isnan(split.covariance).any()


def test_an_expert_without_rows_is_named() -> None:
    x, y = problems.two_planes(0)
    model = MixtureOfExpertsRegressor(2, gate_penalty=0.0, expert_penalty=0.0, **LIMIT).fit(x, y)
    gate = [[0, 0, 0], [-60, 0, 0]]
    expert = [[0, 0, 0], [1e3, 0, 0]]
    model._set_parameters(model._mixture, model._view, gate, expert, [3.0, 1.0])
    notes = model.summary(x, y).notes
    assert any(
        note.startswith("expert 1: these rows do not determine 4 of its 4 parameters (it has less")
        for note in notes
    )


def test_a_fit_that_stopped_early_or_at_no_maximum_says_so() -> None:
    x, y = problems.two_planes(0)
    early = MixtureOfExpertsRegressor(2, max_iter=5).fit(x, y).summary(x, y)
    assert any("standard errors away" in note for note in early.notes)
    late = MixtureOfExpertsRegressor(2, **LIMIT).fit(x, y)
    assert not late.summary(x, y).notes
    (note,) = late.summary(x, 1e200 * y).notes
    assert note == "the information is not finite: targets are too far from what an expert predicts"
    same: Any = {"gate_coef": np.zeros((2, 3)), "expert_coef": np.zeros((2, 3))}
    start = {**same, "expert_std": [2.0, 2.0]}
    copies = MixtureOfExpertsRegressor(2, start=start, **LIMIT).fit(x, y).summary(x, y)
    assert np.isnan(copies.standard_errors).all()
    assert "have no maximum of the log-likelihood here" in copies.notes[0]


def test_a_rule_and_estimators_count_as_known() -> None:
    x, y = problems.two_planes(0)
    gate = PartitionGate(rule=lambda columns: (columns[:, 0] > 0).astype(int))
    settings: Any = {"gate": gate, "expert_penalty": 0.0}
    found = MixtureOfExpertsRegressor(2, **settings).fit(x, y).summary(x, y)
    side = x[:, 0] > 0
    alone = MixtureOfExpertsRegressor(1, expert_penalty=0.0).fit(x[side], y[side])
    assert_allclose(found.standard_errors[4:], alone.summary(x[side], y[side]).standard_errors)
    by_estimators = MixtureOfExpertsRegressor(2, experts=Ridge(), **LIMIT).fit(x, y)
    assert {part for part, _ in by_estimators.summary(x, y).names} == {"gate"}
    with pytest.raises(ValueError, match="there are no parameters"):
        MixtureOfExpertsRegressor(2, experts=Ridge(), gate=gate).fit(x, y).summary(x, y)


def test_an_estimator_before_or_after_a_named_expert_leaves_it_the_same_error() -> None:
    x, y = problems.two_planes(0)
    start = np.random.default_rng(0).dirichlet([1, 1], 80)
    (gate, own), (gate_of_other, of_other) = (
        np.split(
            MixtureOfExpertsRegressor(2, experts=experts, start=responsibilities, **LIMIT)
            .fit(x, y)
            .summary(x, y)
            .standard_errors,
            [3],
        )
        for experts, responsibilities in (
            (["linear", LinearRegression()], start),
            ([LinearRegression(), "linear"], start[:, ::-1]),
        )
    )
    assert np.isfinite([*gate, *own]).all()
    assert_allclose(gate_of_other, gate)
    assert_allclose(of_other, own)


def test_degrees_of_freedom_have_an_error_like_that_of_other_parameters() -> None:
    """The intervals of noise and degrees of freedom are those of the likelihood by scipy."""
    random = np.random.default_rng(0)
    x, noise = random.normal(size=(500, 1)), stats.t(3).rvs(500, random_state=random)
    model = MixtureOfExpertsRegressor(1, experts="student_t", expert_penalty=0.0, **LIMIT)
    found = model.fit(x, x[:, 0] + noise).summary(x, x[:, 0] + noise)
    assert not found.notes and found.names[-1] == ("expert 0", "df_")
    assert found.estimates[-1] == model.experts_[0].df_ and np.isnan(found.z_values[-1])
    left, step = x[:, 0] + noise - model.predict(x), 1e-3

    def value(log_std: float, log_df: float) -> float:
        return stats.t(np.exp(log_df), 0, np.exp(log_std)).logpdf(left).sum()

    a, b = np.log(found.estimates[-2:])
    diagonal = [
        (value(a + s, b + t) + value(a - s, b - t) - 2 * value(a, b)) / step**2
        for s, t in ((step, 0), (0, step), (step, step))
    ]
    crossed = (diagonal[2] - diagonal[0] - diagonal[1]) / 2
    covariance = -np.linalg.inv([[diagonal[0], crossed], [crossed, diagonal[1]]])
    errors = np.sqrt(np.diag(covariance)) * found.estimates[-2:]
    assert_allclose(found.standard_errors[-2:], errors, rtol=0.02)
    low, high = found.interval()[-1]
    assert low < 3 < high and low * high == pytest.approx(found.estimates[-1] ** 2)
    gaussian = model.fit(x, np.sin(99 * x[:, 0])).summary(x, np.sin(99 * x[:, 0]))
    assert (
        np.isnan(gaussian.standard_errors[-1]) and np.isfinite(gaussian.standard_errors[:-1]).all()
    )
    assert gaussian.notes[0].startswith("expert 0: df_ is at its bound, 200: no standard error")
    given = MixtureOfExpertsRegressor(1, experts=StudentT(3)).fit(x, noise)
    assert given.summary(x, noise).names[-1] == ("expert 0", "std_")


def test_the_bootstrap_agrees_with_the_information_where_both_hold() -> None:
    x, y = problems.two_planes(0, rows=400)
    model = MixtureOfExpertsRegressor(2, tol=1e-6).fit(x, y)
    before = model.gate_coef_.copy()
    found, other = model.bootstrap(x, 40, random_state=0), model.summary(x, y)
    assert found.names == other.names and not found.notes
    assert_allclose(found.estimates, other.estimates)
    assert_allclose(found.standard_errors, other.standard_errors, rtol=0.35)
    assert_allclose(found.interval(0.5), np.quantile(found.refits, [0.25, 0.75], axis=0).T)
    again = model.bootstrap(x, 2, random_state=0)
    assert_allclose(again.refits, found.refits[:2])
    assert "a parametric bootstrap of 40 refits" in str(found)
    assert np.array_equal(model.gate_coef_, before) and not model.warm_start


def test_a_bootstrap_of_classes_and_counts_draws_such_targets() -> None:
    x, y = problems.crossed(0)
    classes = np.array(["left", "right"])[y]
    model = MixtureOfExpertsClassifier(2, **PENALTIES, **LIMIT).fit(x, classes)
    assert np.isfinite(model.bootstrap(x, 3, random_state=0).standard_errors).all()
    drawn = model._draw(x, 500, np.random.RandomState(0))
    shares = np.mean(drawn == "right", axis=0)
    assert_allclose(shares, model.predict_proba(x)[:, 1], atol=0.12)
    x, y = problems.counts(0)
    poisson = MixtureOfExpertsRegressor(2, experts="poisson", **LIMIT).fit(x, y)
    assert np.isfinite(poisson.bootstrap(x, 3, random_state=0).standard_errors).all()


def test_refits_that_fail_are_counted() -> None:
    x, y = problems.two_planes(0)
    model = MixtureOfExpertsRegressor(2, tol=1e-9, max_iter=5).fit(x, y)
    with pytest.raises(ValueError, match="bootstrap: 5 of 5 refits failed or did not converge"):
        model.bootstrap(x, 5, random_state=0)
    some = model.set_params(tol=3e-4).bootstrap(x, 20, random_state=0)
    failed = 20 - len(some.refits)
    assert 0 < failed < 19 and some.notes[0].startswith(f"{failed} of 20 refits failed")
    for number in (1, 2.5, "many"):
        with pytest.raises(ValueError, match=f"n_refits={number!r}"):
            model.bootstrap(x, number)


def test_a_level_that_is_no_probability_is_a_value_error() -> None:
    x, y = problems.two_planes(0)
    found = MixtureOfExpertsRegressor(1).fit(x, y).summary(x, y)
    with pytest.raises(ValueError, match="level=95"):
        found.interval(95)
    shown = dataclasses.replace(found, estimates=1e3 * found.estimates)
    assert "< 2e-16" in str(shown)


def test_a_column_of_any_name_is_a_slope_and_one_of_zeros_has_an_interval() -> None:
    x = np.random.default_rng(0).normal(size=(60, 2)) * [1.0, 0.0]
    frame = DataFrame(x, columns=["price_std_", "none"])
    summary = (
        MixtureOfExpertsRegressor(1)
        .fit(frame, x[:, 0] + x[::-1, 0])
        .summary(frame, x[:, 0] + x[::-1, 0])
    )
    assert summary.names[1] == ("expert 0", "price_std_")
    assert np.isfinite(summary.z_values[1]) and np.isnan(summary.z_values[-1])
    low, high = summary.interval()[1]
    assert_allclose(
        [low + high, high - low],
        [2 * summary.estimates[1], 3.92 * summary.standard_errors[1]],
        rtol=1e-4,
    )
    assert summary.estimates[2] == 0 and np.isfinite(summary.interval()).all()


def test_a_bootstrap_whose_refits_all_fail_names_the_reason() -> None:
    x, y = problems.two_planes(0, rows=60)
    model = MixtureOfExpertsRegressor(2, max_iter=500).fit(x, y)
    with pytest.raises(
        ValueError, match="5 of 5 refits failed .* the last error: the experts, their"
    ):
        model.set_params(n_experts=3).bootstrap(x, 5)
