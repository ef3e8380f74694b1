"""Arrays as targets, and the contract of scikit-learn."""

from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
from sklearn.model_selection import GridSearchCV, cross_val_predict
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler
from sklearn.utils import estimator_checks
from sklearn.utils.estimator_checks import parametrize_with_checks

from vmoe.multitask import MultiTaskClassifier, MultiTaskEstimator
from vmoe.multitask.splits import Split
from vmoe.multitask.targets import new_tasks, targets_of

X = np.random.default_rng(0).normal(size=(60, 3))
SIDE, SUM = (X[:, 0] > 0).astype(int), 3 * X[:, 0] + 0.5
BOTH = np.stack([SIDE, SUM], axis=1)
CLASSES = np.stack([SIDE, np.digitize(X[:, 1], [-0.5, 0.5])], axis=1)

BY_DESIGN = {
    "check_sample_weight_equivalence_on_dense_data": "a row is in one split, and an epoch has the "
    "steps of the rows that there are, whatever their weights",
}
QUICK = [  # of those that did not pass when y had to be by name
    "check_complex_data",
    "check_estimators_empty_data_messages",
    "check_fit2d_1sample",
    "check_requires_y_none",
]


def small(kind: Any = MultiTaskEstimator, **settings: Any) -> Any:
    defaults = {"expert_units": (4,), "tower_units": (), "max_epochs": 2, "random_state": 0}
    return kind("shared_bottom", **{**defaults, "validation_fraction": 0, **settings})


@pytest.mark.slow
@parametrize_with_checks(
    [MultiTaskClassifier(), MultiTaskEstimator()], expected_failed_checks=lambda _: BY_DESIGN
)
def test_every_check_of_scikit_learn_passes_for_the_defaults(estimator: Any, check: Any) -> None:
    check(estimator)


@pytest.mark.parametrize("name", QUICK)
def test_checks_of_scikit_learn_pass_for_the_defaults(name: str) -> None:
    getattr(estimator_checks, name)("MultiTaskEstimator", MultiTaskEstimator())


@pytest.mark.parametrize("y", [BOTH, BOTH.tolist()], ids=["array", "list"])
def test_the_columns_of_an_array_are_tasks_named_by_number(y: Any) -> None:
    named = {"0": SIDE, "1": SUM}
    expected, learned = small().fit(X, named), small().fit(X, y, validation=(X, y))
    assert list(learned.tasks_) == ["0", "1"]
    predicted = expected.predict(X)
    np.testing.assert_array_equal(learned.predict(X), np.stack([*predicted.values()], axis=1))
    assert learned.scores(X, y) == expected.scores(X, named)
    assert learned.score(X, y) == expected.score(X, named)


def test_probabilities_are_a_list_for_columns_and_an_array_for_a_vector() -> None:
    two, one = small(MultiTaskClassifier).fit(X, CLASSES), small().fit(X, SIDE)
    found = two.predict_proba(X)
    assert [each.shape for each in found] == [(60, 2), (60, 3)]
    best = np.stack([each.argmax(1) for each in found], axis=1)
    np.testing.assert_array_equal(two.predict(X), best)
    assert one.predict_proba(X).shape == (60, 2)
    np.testing.assert_array_equal(one.predict_proba(X).argmax(1), one.predict(X))
    with pytest.raises(ValueError, match="task '1' is no classification and has no probabilities"):
        small().fit(X, BOTH).predict_proba(X)


@pytest.mark.parametrize(
    ("y", "shape"),
    [
        (SUM, (60,)),
        (SUM.tolist(), (60,)),
        (pd.Series(SUM, index=np.arange(60) + 5), (60,)),
        (SUM[:, None], (60, 1)),
    ],
    ids=["array", "list", "Series", "column"],
)
def test_a_vector_is_one_task_and_predictions_have_its_shape(y: Any, shape: Any) -> None:
    learned = small().fit(X, y)
    assert learned.predict(X).shape == shape
    assert learned.scores(X, y) == learned.scores(X, {"0": SUM})


def test_text_beside_numbers_stays_what_it_is() -> None:
    y = np.empty((60, 2), object)
    y[:, 0], y[:, 1] = np.where(SIDE, "right", "left"), SUM
    predicted = small().fit(X, y).predict(X)
    assert set(predicted[:, 0]) <= {"left", "right"}
    assert all(isinstance(number, float) for number in predicted[:, 1])


def test_missing_targets_of_an_array_count_in_no_loss() -> None:
    some = np.where(np.arange(60)[:, None] % 2, BOTH, [np.nan, 1.5])
    learned = small().fit(X, some)
    assert learned.tasks_["0"].classes.tolist() == [0, 1]
    assert learned.predict(X).shape == (60, 2)


def test_a_chain_of_columns_predicts_them_in_their_order() -> None:
    rare = np.stack([X[:, 0] > 1, X[:, 0] > 0], axis=1)  # the second comes first in the chain
    learned = small(MultiTaskClassifier).set_params(architecture="esmm", chain=("1", "0"))
    learned.fit(X, rare)
    assert list(learned.tasks_) == ["1", "0"]
    second, first = learned.predict_proba(X)
    assert (second[:, 1] <= first[:, 1]).all()
    np.testing.assert_array_equal(learned.predict(X)[:, 0], second[:, 1] > 0.5)


def test_arrays_train_by_parts_and_loaded_models_predict_arrays(tmp_path: Path) -> None:
    learned = small(n_experts=2).partial_fit(X, BOTH)
    assert learned.partial_fit(X, BOTH).predict(X).shape == (60, 2)
    learned.save(tmp_path / "model")
    loaded = MultiTaskEstimator.load(tmp_path / "model")
    np.testing.assert_array_equal(loaded.predict(X), learned.predict(X))
    assert loaded.partial_fit(X, {"0": SIDE, "1": SUM}).predict(X).shape == (60, 2)
    with pytest.raises(ValueError, match=r"has the tasks \['0'\]: expected \['0', '1'\]"):
        loaded.partial_fit(X, SIDE)
    assert set(loaded.fit(X, {"sum": SUM}).predict(X)) == {"sum"}


def test_pipelines_searches_and_cross_validation_hand_arrays_on() -> None:
    search = GridSearchCV(
        make_pipeline(StandardScaler(), small()),
        {"multitaskestimator__learning_rate": [1e-6, 0.1]},
        cv=2,
    )
    assert search.fit(X, BOTH).best_params_ == {"multitaskestimator__learning_rate": 0.1}
    assert search.predict(X).shape == (60, 2)
    assert cross_val_predict(small(), X, BOTH, cv=2).shape == (60, 2)


@pytest.mark.parametrize("y", [SUM[:, None, None], 3.5, "sum", (x for x in SUM)])
def test_what_is_no_array_gets_one_line(y: Any) -> None:
    with pytest.raises(ValueError, match=r"^y has shape .*: give an array \(b,\) or .* by name$"):
        small().fit(X, y)


@pytest.mark.parametrize(
    ("kind", "values"),
    [
        ("Classification", np.arange(30) % 20),
        ("Classification", np.arange(42) % 21),
        ("Regression", np.arange(40) % 21),
        ("Regression", (np.arange(400) % 201).astype(np.uint8).astype(float)),
        ("Classification", np.array([0, 2**53, -(2**53)] * 9)),
        ("Regression", np.array([0, 2**53 + 1] * 9)),
        ("Regression", [0, -(2**53) - 1] * 9),
        ("Regression", [10**18, 10**20] * 9),
        ("Regression", np.array([2**63, 2**63 + 2048] * 9, np.uint64)),
        ("Regression", np.array([1e18, np.nan, 3e18] * 9)),
        ("Regression", np.array([0.5, np.nan, 1] * 9, np.float16)),
        ("Classification", np.array([0, np.nan, 1] * 9, np.float16)),
    ],
)
def test_numbers_are_a_regression_if_fractional_beyond_2_to_53_or_mostly_distinct(
    kind: str, values: Any
) -> None:
    n = len(values)
    given = Split(np.zeros((n, 1)), targets_of(values, n), None, np.arange(n))
    (task,) = new_tasks(small(), given, ())[0].values()
    assert type(task).__name__ == kind


def test_large_numbers_are_learned() -> None:
    y = (1e18 * X[:, 0]).astype(np.int64) + 3 * 10**18
    learned = small(max_epochs=60, learning_rate=0.05).fit(X, y)
    assert learned.score(X, y) > 0.9
