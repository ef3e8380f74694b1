"""On-line EM."""

from typing import Any

import numpy as np
import pytest
from numpy.testing import assert_allclose
from scipy.sparse import csr_array
from sklearn.linear_model import Ridge
from sklearn.metrics import log_loss

from tests.classic import problems
from vmoe.classic import (
    HierarchicalMixtureClassifier,
    MixtureOfExpertsClassifier,
    MixtureOfExpertsRegressor,
    PartitionGate,
)

pytestmark = pytest.mark.filterwarnings("ignore::sklearn.exceptions.ConvergenceWarning")


def stream(model: Any, x: np.ndarray, y: np.ndarray, **first: Any) -> Any:
    """The model after batches of 100 rows."""
    for i in range(0, len(y), 100):
        model.partial_fit(x[i : i + 100], y[i : i + 100], **({} if i else first))
    return model


def test_batches_seen_once_come_close_to_em_on_all_rows() -> None:
    x, y = problems.two_planes(0, rows=2000)
    whole = MixtureOfExpertsRegressor(2).fit(x, y)
    online = stream(MixtureOfExpertsRegressor(2, decay=1.0), x, y)
    first = MixtureOfExpertsRegressor(2).fit(x[:100], y[:100])
    truth = whole.predict(x)
    error, before = (np.mean((m.predict(x) - truth) ** 2) for m in (online, first))
    assert error < 0.01 and error < 0.5 * before


def test_a_classifier_learns_from_batches_seen_once() -> None:
    x, y = problems.crossed(0, rows=1000)
    model = stream(HierarchicalMixtureClassifier((2, 2), decay=1.0), x, y, classes=[0, 1])
    first = HierarchicalMixtureClassifier((2, 2), decay=1.0).partial_fit(x[:100], y[:100])
    losses = [log_loss(y, one.predict_proba(x)) for one in (model, first)]
    assert losses[0] < 0.8 * losses[1]


def test_a_batch_after_a_fit_continues_from_it() -> None:
    x, y = problems.two_planes(0, rows=2000)
    model = MixtureOfExpertsRegressor(2).fit(x, y)
    before = model.predict(x)
    after = model.partial_fit(x[:5], y[:5]).predict(x)
    assert 0 < np.abs(after - before).max() < 0.1


def test_a_partition_stays_as_it_is() -> None:
    x, y = problems.two_planes(0)
    gate = PartitionGate(rule=lambda columns: (columns[:, 0] > 0).astype(int))
    model = MixtureOfExpertsRegressor(2, gate=gate).fit(x, y)
    error = np.mean((model.predict(x) - y) ** 2)
    model.partial_fit(x, y)
    assert_allclose(model.gate_proba(x), np.eye(2)[(x[:, 0] > 0).astype(int)])
    assert np.mean((model.predict(x) - y) ** 2) < 1.1 * error


def test_classes_are_those_of_the_first_batch_that_was_learned() -> None:
    x, y = problems.crossed(0)
    model = MixtureOfExpertsClassifier(2)
    with pytest.raises(ValueError, match="NaN"):
        model.partial_fit(np.full_like(x, np.nan), y, classes=[0, 1, 2])
    model.partial_fit(x, y)
    assert model.classes_.tolist() == [0, 1]
    with pytest.raises(ValueError, match="classes"):
        model.partial_fit(x, y, classes=[0, 1, 2])


def test_a_class_that_the_first_batch_lacks_is_learned_from_later_ones() -> None:
    random = np.random.default_rng(0)
    x = random.normal(size=(1000, 2))
    y = np.where(x[:, 0] > 1, 2, x[:, 0] * x[:, 1] < 0)
    first = np.isin(np.arange(1000), np.flatnonzero(y != 2)[:100])
    model = MixtureOfExpertsClassifier(3, decay=1.0)
    model.partial_fit(x[first], y[first], classes=[0, 1, 2])
    assert 0 < model.predict_proba(x)[:, 2].mean() < 0.05
    stream(model, x[~first], y[~first])
    assert log_loss(y, model.predict_proba(x)) < 0.2
    assert model.score(x[y == 2], y[y == 2]) > 0.9


def test_a_first_batch_may_have_one_class_weights_and_a_start() -> None:
    x, y = problems.crossed(0)
    start = np.full((len(x), 2), 0.5)
    start[::2] = [0.9, 0.1]
    settings = {"start": start, "max_iter": 3}
    weighted = MixtureOfExpertsClassifier(2, **settings).partial_fit(
        csr_array(x), y, classes=[0, 1, 2], sample_weight=y
    )
    assert weighted.predict_proba(x)[:, 1].min() > 0.5
    assert weighted.partial_fit(x, y).score(x, y) > weighted.score(x, 1 - y)
    with pytest.raises(ValueError, match="previously unseen classes: .3."):
        weighted.partial_fit(x, y + 2)


def test_experts_that_are_not_linear_cannot_learn_on_line() -> None:
    x, y = problems.counts(0)
    for experts in ("poisson", "student_t", ["linear", "linear"], Ridge()):
        model = MixtureOfExpertsRegressor(2, experts=experts)
        assert not hasattr(model, "partial_fit")
        with pytest.raises(AttributeError, match="no attribute 'partial_fit'") as error:
            model.partial_fit(x, y)
        assert "partial_fit needs one of" in str(error.value.__cause__)


@pytest.mark.parametrize(
    "changed",
    [{"n_experts": 3}, {"gate_features": [0]}, {"gate": PartitionGate(centers=np.eye(2))}],
    ids=lambda changed: next(iter(changed)),
)
def test_a_batch_for_another_mixture_is_a_value_error(changed: dict[str, Any]) -> None:
    x, y = problems.two_planes(0)
    model = MixtureOfExpertsRegressor(2, max_iter=3).partial_fit(x, y)
    before = model.predict(x)
    with pytest.raises(ValueError, match="have changed since the last fit"):
        model.set_params(**changed).partial_fit(x, y)
    assert np.array_equal(model.predict(x), before)


def test_a_batch_after_a_fit_with_groups_is_a_value_error() -> None:
    x, y = problems.two_planes(0)
    model = MixtureOfExpertsRegressor(2, gate_features=[], max_iter=3)
    model.fit(x, y, groups=np.arange(80) // 4)
    with pytest.raises(ValueError, match="groups: the last fit had some, .* fit again without"):
        model.partial_fit(x, y)
    assert model.fit(x, y).partial_fit(x, y).predict(x).shape == (80,)


def test_a_batch_follows_settings_that_changed() -> None:
    x, y = problems.two_planes(0)
    model, other = (MixtureOfExpertsRegressor(2, max_iter=3).partial_fit(x, y) for _ in range(2))
    model.partial_fit(x, y)
    other.set_params(gate_penalty=1e9, expert_penalty=1e9)
    still = other.gate_coef_, other.experts_[0].coef_
    other.partial_fit(x, y)
    assert_allclose(other.gate_coef_, still[0], atol=1e-5)
    assert_allclose(other.experts_[0].coef_, still[1], atol=1e-5)
    assert np.abs(model.gate_coef_ - still[0]).max() > 0.01
    with pytest.raises(ValueError, match="The 'decay' parameter"):
        model.set_params(decay=2.0).partial_fit(x, y)
