"""Chains of events, ESMM and AITM, against loops in float64 and through the estimator."""

import copy
import pickle
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pandas as pd
import pytest
from flax import nnx
from scipy.special import expit

from vmoe.errors import UsageError
from vmoe.multitask import (
    AdaptiveTransfer,
    Aitm,
    Esmm,
    MultiTaskClassifier,
    MultiTaskEstimator,
    TaskNetworks,
)
from vmoe.multitask.build import ReluLayers
from vmoe.multitask.chains import logit_of_product
from vmoe.multitask.tasks import Classification
from vmoe.multitask.training import Data, Trainer
from vmoe.multitask.weighting import Weighting

D, F = 5, 4
ROWS = jnp.asarray(np.random.default_rng(0).normal(size=(7, D)), jnp.float32)
EVENTS = ("seen", "click", "buy")


def linear(layer: nnx.Linear, x: np.ndarray) -> np.ndarray:
    bias = 0 if layer.bias is None else np.asarray(layer.bias[...], np.float64)
    return x @ np.asarray(layer.kernel[...], np.float64) + bias


def make(n: int, rngs: nnx.Rngs, width: int = D, out: int = F) -> list[nnx.Linear]:
    return [nnx.Linear(width, out, rngs=rngs) for _ in range(n)]


def towers(rngs: nnx.Rngs) -> dict[str, nnx.Linear]:
    return dict(zip(EVENTS, make(3, rngs, F, 1), strict=True))


@nnx.jit
def run(model: Any) -> Any:
    return model.forward(ROWS)


def test_esmm_multiplies_the_probabilities_along_the_chain() -> None:
    rngs = nnx.Rngs(0)
    networks, of_tasks = make(3, rngs), towers(rngs)
    outputs, weights, loss = run(Esmm(TaskNetworks(networks), of_tasks))
    for b, row in enumerate(np.asarray(ROWS, np.float64)):
        p = 1.0
        for name, network in zip(EVENTS, networks, strict=True):
            p *= expit(linear(of_tasks[name], linear(network, row))[0])
            assert expit(float(outputs[name][b, 0])) == pytest.approx(p, rel=1e-5)
    assert weights is None and loss == 0


def test_the_loss_of_esmm_is_that_of_clicks_and_of_purchases_over_all_rows() -> None:
    """No row is left out of the second, and the tower of purchases has no third."""
    rngs = nnx.Rngs(0)
    networks, of_tasks = make(2, rngs), towers(rngs)
    of_tasks.pop("seen")
    graph, params = nnx.split(Esmm(TaskNetworks(networks), of_tasks))
    events = {"click": np.arange(7) % 2, "buy": np.arange(7) % 4 == 1}
    labeled = np.ones(7, bool)
    tasks = [Classification(name, values, labeled) for name, values in events.items()]
    losses_of = tuple(task.loss for task in tasks)
    trainer = Trainer(graph, losses_of, Weighting(), optax.identity())
    data = Data(ROWS, tuple(jnp.asarray(x, int) for x in events.values()), (labeled, labeled))
    found = jax.jit(trainer.losses)(params, data).tasks
    expected, p = [], np.ones(7)
    for network, tower, happened in zip(networks, of_tasks.values(), events.values(), strict=True):
        p = p * expit(linear(tower, linear(network, np.asarray(ROWS, np.float64)))[:, 0])
        expected.append(-np.mean(np.where(happened, np.log(p), np.log(1 - p))))
    np.testing.assert_allclose(found, expected, rtol=1e-5)


def test_aitm_mixes_what_the_event_before_transfers_with_the_features_of_the_task() -> None:
    rngs = nnx.Rngs(0)
    networks, transfers = make(3, rngs), make(2, rngs, F)
    value, query, key = make(3, rngs, F)
    body = AdaptiveTransfer(networks, transfers, value=value, query=query, key=key)
    of_tasks = towers(rngs)
    made = nnx.jit(lambda body: body(ROWS))(body)
    outputs, _, loss = run(Aitm(body, of_tasks, weight=0.6))
    rises = []
    for b, row in enumerate(np.asarray(ROWS, np.float64)):
        z = linear(networks[0], row)
        p = [expit(linear(of_tasks["seen"], z)[0])]
        for t in (1, 2):
            both = (linear(transfers[t - 1], z), linear(networks[t], row))
            powers = [np.exp(linear(query, u) @ linear(key, u) / np.sqrt(F)) for u in both]
            z = sum(w * linear(value, u) for w, u in zip(powers, both, strict=True)) / sum(powers)
            np.testing.assert_allclose(made.features[t, b], z, rtol=1e-4, atol=1e-5)
            p.append(expit(linear(of_tasks[EVENTS[t]], z)[0]))
        np.testing.assert_allclose(
            [expit(float(outputs[name][b, 0])) for name in EVENTS], p, rtol=1e-4
        )
        rises.append(sum(max(after - before, 0) for before, after in zip(p, p[1:], strict=False)))
    assert loss == pytest.approx(0.6 * np.mean(rises), rel=1e-4) and loss > 0


def test_the_logit_of_a_product_and_its_gradient_stay_finite() -> None:
    """Near 0 and 1, where p or 1 - p q underflows in float32."""
    values = [-200.0, -30.0, -1.0, 0.0, 2.0, 30.0, 200.0]
    a, b = (jnp.array(x) for x in np.meshgrid(values, values))
    found = logit_of_product(a, b)
    wide = np.asarray(a, np.longdouble), np.asarray(b, np.longdouble)
    p, q = (1 / (1 + np.exp(-x)) for x in wide)
    not_p, not_q = (1 / (1 + np.exp(x)) for x in wide)
    np.testing.assert_allclose(found, np.log(p * q / (not_p + p * not_q)), rtol=1e-5, atol=1e-5)
    gradients = jax.grad(lambda a, b: logit_of_product(a, b).sum(), (0, 1))(a, b)
    assert np.isfinite(gradients).all()


def test_tasks_and_modules_that_make_no_chain_get_one_line() -> None:
    rngs = nnx.Rngs(0)
    wide = {"click": nnx.Linear(F, 1, rngs=rngs), "buy": nnx.Linear(F, 3, rngs=rngs)}
    for kind in (Esmm, Aitm):
        with pytest.raises(UsageError, match="task 'buy' has 3 outputs: a task of a chain has one"):
            kind(TaskNetworks(make(2, rngs)), wide).forward(ROWS)
    parts = dict(zip(("value", "query", "key"), make(3, rngs, F), strict=True))
    with pytest.raises(UsageError, match="there are 3 networks and 1 transfers"):
        AdaptiveTransfer(make(3, rngs), [ReluLayers(F, (F,), rngs=rngs)], **parts)


RANDOM = np.random.default_rng(0)
X = RANDOM.normal(size=(1500, 4))
CTR, CVR = expit(X[:, 0] - 0.5), expit(2 * X[:, 1])
CLICK = RANDOM.random(1500) < CTR
BUY = CLICK & (RANDOM.random(1500) < CVR)
EVENTS_OF_ALL = {"click": CLICK, "buy": BUY}
UNKNOWN = pd.DataFrame({"click": CLICK, "buy": pd.array(BUY).astype("boolean")})
UNKNOWN.loc[~CLICK, "buy"] = pd.NA


def fitted(architecture: str, y: Any, **settings: Any) -> MultiTaskClassifier:
    defaults = {"max_epochs": 40, "learning_rate": 0.02, "batch_size": 128, "random_state": 0}
    settings = defaults | {"expert_units": (4,), "tower_units": ()} | settings
    return MultiTaskClassifier(architecture, chain=("click", "buy"), **settings).fit(X, y)


@pytest.fixture(scope="module")
def esmm() -> MultiTaskClassifier:
    return fitted("esmm", {"buy": BUY, "click": CLICK})  # in any order


def test_esmm_learns_the_rate_of_purchases_after_a_click_for_all_rows(
    esmm: MultiTaskClassifier,
) -> None:
    """The rates that made the events are known, also for rows without a click."""
    of_all = esmm.predict_proba(X)
    assert list(of_all) == ["click", "buy"]  # in the order of the chain
    assert np.corrcoef(of_all["click"][:, 1], CTR)[0, 1] > 0.95
    assert np.corrcoef(of_all["buy"][:, 1], CTR * CVR)[0, 1] > 0.95
    given = esmm.conditional_proba(X)
    assert list(given) == ["buy"]
    assert np.corrcoef(given["buy"][~CLICK], CVR[~CLICK])[0, 1] > 0.9
    np.testing.assert_allclose(given["buy"] * of_all["click"][:, 1], of_all["buy"][:, 1], rtol=1e-6)
    assert (of_all["buy"][:, 1] <= of_all["click"][:, 1]).all()


def test_purchases_that_are_unknown_without_a_click_are_none(esmm: MultiTaskClassifier) -> None:
    """Left out of the loss, they would make every row a click."""
    again = fitted("esmm", UNKNOWN)
    for name, expected in esmm.predict_proba(X).items():
        np.testing.assert_array_equal(again.predict_proba(X)[name], expected)
    assert again.scores(X, UNKNOWN) == esmm.scores(X, EVENTS_OF_ALL)
    with pytest.raises(ValueError, match="chain: scored row 0 has 'buy' without 'click'"):
        again.scores(X, {"click": np.zeros(1500, bool), "buy": np.ones(1500, bool)})


def test_purchases_that_are_unknown_without_a_click_count_in_class_weights_and_scores() -> None:
    settings = {"class_weight": "balanced", "monitor": ("buy", "roc_auc"), "max_epochs": 2}
    known, unknown = (fitted("esmm", y, **settings) for y in (EVENTS_OF_ALL, UNKNOWN))
    for one, other in zip(known.history_, unknown.history_, strict=True):
        assert one | {"seconds": 0} == other | {"seconds": 0}
    unknown.set_params(class_weight=None)
    unknown.partial_fit(X[~CLICK], UNKNOWN[~CLICK])  # where all purchases follow
    assert unknown.history_[-1]["train"]["buy"] > 0


@pytest.mark.parametrize("kind", ["text", "dates"])
def test_a_purchase_that_is_unknown_in_all_rows_follows_as_text_and_as_a_date(kind: str) -> None:
    """NaN beside text would be the class "nan", and beside dates it has no type."""
    classes = {"text": np.array(["no", "yes"]), "dates": np.array([0, 1], "M8[us]")}[kind]
    y = {name: classes[each.astype(int)] for name, each in (("click", CLICK), ("buy", BUY))}
    model = fitted("esmm", y, max_epochs=1, validation_fraction=0)
    nothing = {"click": y["click"], "buy": np.full(len(X), np.nan)}
    known = {"click": y["click"], "buy": np.where(CLICK, None, y["buy"].astype(object))}
    assert model.scores(X, nothing) == model.scores(X, known)
    model.set_params(chain=None)
    assert model.scores(X, nothing) == model.scores(X, known)


def test_rows_of_weight_0_are_not_scored_and_count_in_the_number_of_a_wrong_row(
    esmm: MultiTaskClassifier,
) -> None:
    wrong = {"click": CLICK.copy(), "buy": BUY.copy()}
    wrong["click"][0], wrong["buy"][0] = False, True
    weight = np.arange(len(X)) > 0
    right = {name: each[1:] for name, each in wrong.items()}
    assert esmm.scores(X, wrong, weight) == esmm.scores(X[1:], right)
    wrong["click"][7], wrong["buy"][7] = False, True
    with pytest.raises(ValueError, match="chain: scored row 7 has 'buy' without 'click'"):
        esmm.scores(X, wrong, weight)


def test_a_purchase_after_a_click_that_is_next_to_impossible_has_its_probability(
    esmm: MultiTaskClassifier,
) -> None:
    changed = pickle.loads(pickle.dumps(esmm))
    click, _ = changed.model_.towers
    click.last.bias[...] = click.last.bias[...] - 1000
    assert (changed.predict_proba(X)["click"][:, 1] == 0).all()
    found = changed.conditional_proba(X)["buy"]
    np.testing.assert_allclose(found, esmm.conditional_proba(X)["buy"], rtol=1e-3)


def test_the_calibrator_of_aitm_makes_probabilities_fall_along_the_chain() -> None:
    events = {"click": CLICK, "buy": BUY}
    rises = {}
    for weight in (0.0, 100.0):
        model = fitted("aitm", events, calibrator_weight=weight, validation_fraction=0)
        p = [each[:, 1] for each in model.predict_proba(X).values()]
        rises[weight] = np.maximum(p[1] - p[0], 0).mean()
        assert np.corrcoef(p[1], CTR * CVR)[0, 1] > 0.9
        assert (model.history_[0]["gates"] > 0) == (weight > 0)
    assert rises[100.0] < rises[0.0] / 2


WRONG = [
    ("name each task once, in the order of their events", {"architecture": "esmm"}, {}),
    ("chain=\\('click',\\): name each task once", {"chain": ("click",)}, {}),
    ("chain=\\('click', 'click'\\): name", {"chain": ("click", "click")}, {}),
    ("chain: 'mmoe' has none", {"architecture": "mmoe", "chain": ("click", "buy")}, {}),
    ("chain: training row 0 has 'buy' without 'click': correct", {}, {"click": ~BUY, "buy": BUY}),
    ("chain: task 'click' is no event", {}, {"click": X[:, 0]}),
    ("chain: task 'buy' is no event", {}, {"buy": np.arange(1500) % 3}),
    ("gate_temperature=2: 'dselect_k' has none", {"gate": "dselect_k", "gate_temperature": 2}, {}),
]


@pytest.mark.parametrize(("message", "settings", "y"), WRONG)
def test_wrong_chains_get_one_line(message: str, settings: dict, y: dict) -> None:
    if "architecture" not in settings:
        settings = {"architecture": "esmm", "chain": ("click", "buy"), **settings}
    if "training row 0" in message:
        first = np.flatnonzero(BUY)[0]
        message = message.replace("row 0", f"row {first}")
    with pytest.raises(ValueError, match=message):
        MultiTaskEstimator(**settings).fit(X, EVENTS_OF_ALL | y)


def test_only_esmm_has_conditional_probabilities() -> None:
    model = MultiTaskClassifier(max_epochs=1, random_state=0).fit(X[:50], {"click": CLICK[:50]})
    for set_later in ("mmoe", "esmm"):
        model.set_params(architecture=set_later)
        with pytest.raises(ValueError, match="'mmoe' has no conditional probabilities: use 'esmm'"):
            model.conditional_proba(X)


def test_a_chain_is_scored_as_the_one_that_was_fitted(esmm: MultiTaskClassifier) -> None:
    later = copy.copy(esmm).set_params(architecture="shared_bottom")
    assert later.scores(X, UNKNOWN) == esmm.scores(X, EVENTS_OF_ALL)
    np.testing.assert_array_equal(
        later.conditional_proba(X)["buy"], esmm.conditional_proba(X)["buy"]
    )
