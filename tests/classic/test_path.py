"""The choice of the number of experts."""

from typing import Any

import matplotlib
import numpy as np
import pytest
from numpy.testing import assert_allclose
from pandas import DataFrame
from scipy import sparse
from scipy.special import logsumexp
from sklearn.base import clone
from sklearn.linear_model import Ridge
from sklearn.model_selection import KFold, StratifiedGroupKFold

from tests.classic import problems
from vmoe.classic import (
    HierarchicalMixtureRegressor,
    MixtureOfExpertsClassifier,
    MixtureOfExpertsRegressor,
    mixture_path,
)


def test_every_criterion_chooses_the_number_of_planes() -> None:
    x, y = problems.two_planes(0, rows=200)
    path = mixture_path(MixtureOfExpertsRegressor(max_iter=50), x, y, [1, 2, 3], cv=2)
    assert [path.best(name).n_experts for name in ("bic", "icl", "held_out")] == [2, 2, 2]
    frame = DataFrame(path.table)
    for model, line in zip(path.estimators, frame.itertuples(), strict=True):
        assert line.aic == model.aic(x, y) and line.bic == model.bic(x, y)
        assert line.icl == model.icl(x, y) and line.converged == model.converged_
    header, *lines = str(path).splitlines()
    assert header.split() == list(path.table)
    assert lines[1].split()[0] == "2" and lines[1].count("*") >= 3


def test_the_held_out_score_is_the_density_of_rows_left_out() -> None:
    """By a loop over folds, with sample weights, from predictions and standard deviations."""
    x, y = problems.two_planes(0)
    weight = np.arange(80) % 3 + 0.5
    folds = KFold(4, shuffle=True, random_state=0)
    estimator = MixtureOfExpertsRegressor(max_iter=20)
    path = mixture_path(estimator, x, y, [2], cv=folds, sample_weight=weight)
    means, total = [], 0.0
    for train, test in folds.split(x):
        model = clone(estimator).set_params(n_experts=2).fit(x[train], y[train], weight[train])
        columns = np.column_stack([np.ones(len(test)), x[test]])
        joint = np.log(model.gate_proba(x[test]))
        for e, expert in enumerate(model.experts_):
            scaled = (y[test] - columns @ expert.coef_) / expert.std_
            joint[:, e] -= 0.5 * scaled**2 + np.log(expert.std_ * np.sqrt(2 * np.pi))
        score = weight[test] @ logsumexp(joint, axis=1)
        total += score
        means.append(score / weight[test].sum())
    assert_allclose(path.table["held_out"], total / weight.sum())
    assert_allclose(path.table["held_out_error"], np.std(means, ddof=1) / 2)


@pytest.mark.parametrize(
    "estimator, numbers",
    [
        (HierarchicalMixtureRegressor((2,), max_iter=10), [2, 3]),
        (MixtureOfExpertsClassifier(max_iter=5), [1, 2]),
    ],
)
def test_hierarchies_and_classifiers_have_a_path(estimator: Any, numbers: list[int]) -> None:
    x, y = problems.two_planes(0, rows=60)
    y = y > 0 if isinstance(estimator, MixtureOfExpertsClassifier) else y
    path = mixture_path(estimator, x, y, numbers, cv=2)
    assert [len(model.experts_) for model in path.estimators] == numbers
    assert np.isfinite(path.table["held_out"]).all()


def test_without_numbers_there_are_six_from_the_tree_on() -> None:
    x, y = problems.two_planes(0, rows=40)
    path = mixture_path(HierarchicalMixtureRegressor((3,), max_iter=1), x, y, cv=None)
    assert path.table["n_experts"] == [3, 4, 5, 6, 7, 8]
    assert np.isnan(path.table["held_out"]).all() and np.isnan(path.table["held_out_error"]).all()


def test_experts_whose_parameters_cannot_be_counted_are_chosen_by_the_held_out_score() -> None:
    x, y = problems.two_planes(0, rows=60)
    estimator = MixtureOfExpertsRegressor(experts=Ridge(), max_iter=5)
    path = mixture_path(estimator, x, y, [1, 2], cv=2)
    assert path.best("held_out").n_experts == 2 and "nan" in str(path)
    found = [
        mixture_path(estimator, sparse.coo_array(x).asformat(form), y, [1, 2], cv=2).table
        for form in ("csr", "coo", "dia")
    ]
    assert found[0]["held_out"] == found[1]["held_out"] == found[2]["held_out"]
    with pytest.raises(ValueError, match=r"criterion='bic' has no values here: .* \['held_out'\]"):
        path.best("bic")
    with pytest.raises(ValueError, match="criterion='r2': expected one of"):
        path.best("r2")
    with pytest.raises(ValueError, match=r"estimator=Ridge\(\): expected an estimator of vmoe"):
        mixture_path(Ridge(), x, y)


def test_degenerate_experts_are_in_the_table_and_behind_the_curves() -> None:
    matplotlib.use("Agg")
    random = np.random.default_rng(0)
    x, y = random.integers(0, 2, (90, 1)).astype(float), random.integers(0, 3, 90).astype(float)
    path = mixture_path(MixtureOfExpertsRegressor(max_iter=10), x, y, [1, 8], cv=2)
    copies = path.table["copies"]
    assert copies == [[], path.estimators[1].degenerate_experts(x, y).copies] and copies[1]
    assert ",".join(map(str, copies[1])) in str(path)
    for ax, names in zip(path.plot(), (["aic", "bic", "icl"], ["held_out"]), strict=True):
        assert [text.get_text() for text in ax.get_legend().get_texts()] == names
        assert [line.get_xdata()[0] for line in ax.lines if line.get_linewidth() == 8] == [8]


def test_folds_of_groups_keep_the_shares_of_classes() -> None:
    x, y = problems.crossed(0)
    who = np.arange(80) // 4
    model = MixtureOfExpertsClassifier(gate_features=[], max_iter=5)
    shares = StratifiedGroupKFold(4, shuffle=True, random_state=0)
    by_number, by_splitter = (
        mixture_path(model, x, y, [1], cv=cv, groups=who).table["held_out"] for cv in (4, shares)
    )
    assert by_number == by_splitter
