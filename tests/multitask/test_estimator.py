"""Several tasks on tables, through fit and predict."""

import pickle
import sys
from decimal import Decimal
from typing import Any

import jax
import jax.numpy as jnp
import matplotlib.pyplot as plt
import numpy as np
import optax
import pandas as pd
import pyarrow
import pytest
from flax import nnx
from scipy.sparse import csr_array
from sklearn.base import clone
from sklearn.exceptions import NotFittedError
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import log_loss, mean_poisson_deviance
from sklearn.model_selection import GridSearchCV

from vmoe.errors import UsageError
from vmoe.multitask import (
    MultiTask,
    MultiTaskClassifier,
    MultiTaskEstimator,
    SharedBottom,
    estimator,
    plot_expert_use,
    training,
)
from vmoe.multitask.build import ARCHITECTURES, CHAINS, BodyConfig, new_model
from vmoe.multitask.columns import TableEncoder, rows_of
from vmoe.multitask.expert_use import equal_experts
from vmoe.multitask.splits import Split, drawn
from vmoe.multitask.targets import new_tasks, targets_of
from vmoe.multitask.tasks import Classification, Count, Regression
from vmoe.multitask.training import Data, Trainer, batches, decayed
from vmoe.multitask.values import is_missing
from vmoe.multitask.weighting import WEIGHTINGS, Losses, Weighting
from vmoe.trees import by_name

RANDOM = np.random.default_rng(0)
X = RANDOM.normal(size=(300, 6))
Y: dict[str, Any] = {
    "positive": np.where(X[:, 0] + 0.1 * X[:, 1] > 0, "yes", "no"),
    "place": np.digitize(X[:, 2], [-0.5, 0.5]),
    "sum": X[:, 0] * 3 + X[:, 3] * 2 + 10,
    "visits": RANDOM.poisson(np.exp(0.5 * X[:, 4] + 1)),
}
KINDS = {"visits": "count"}
FEW = np.arange(300) % 20 == 0


def model(architecture: str = "mmoe", **settings: Any) -> MultiTaskEstimator:
    defaults = {"n_experts": 3, "max_epochs": 3, "batch_size": 32, "random_state": 0}
    return MultiTaskEstimator(architecture, **{**defaults, "learning_rate": 0.01, **settings})


def plain(**settings: Any) -> MultiTaskEstimator:
    """A model whose programs are small, for what is decided before and after it."""
    small = {"max_epochs": 1, "expert_units": (4,), "tower_units": (), "validation_fraction": 0}
    return model("shared_bottom", **{**small, **settings})


@pytest.fixture(scope="module")
def fitted() -> MultiTaskEstimator:
    return model(max_epochs=60, kinds=KINDS).fit(X, Y)


def test_tasks_of_all_kinds_are_learned_together(fitted: MultiTaskEstimator) -> None:
    assert [type(task) for task in fitted.tasks_.values()] == [
        Classification,
        Classification,
        Regression,
        Count,
    ]
    scores = fitted.scores(X, Y)
    assert scores["positive"] > 0.95
    assert scores["place"] > 0.9
    assert scores["sum"] > 0.95
    assert scores["visits"] > 0.2
    assert fitted.score(X, Y) == pytest.approx(np.mean(list(scores.values())))


def test_predictions_have_the_form_of_the_targets(fitted: MultiTaskEstimator) -> None:
    predicted = fitted.predict(X[:5])
    assert set(predicted["positive"]) <= {"yes", "no"}
    assert predicted["place"].dtype == Y["place"].dtype
    assert predicted["sum"].mean() == pytest.approx(Y["sum"][:5].mean(), abs=1)
    assert (predicted["visits"] > 0).all()
    probabilities = fitted.predict_proba(X[:5])
    assert list(probabilities) == ["positive", "place"]
    assert probabilities["place"].shape == (5, 3)
    for of_task in probabilities.values():
        np.testing.assert_allclose(of_task.sum(1), 1, rtol=1e-5)
    best = fitted.tasks_["place"].classes[probabilities["place"].argmax(1)]
    np.testing.assert_array_equal(predicted["place"], best)


@pytest.mark.long_after(3)
@pytest.mark.parametrize("architecture", [x for x in ARCHITECTURES if x not in CHAINS])
def test_every_architecture_learns(architecture: str) -> None:
    learned = model(architecture=architecture, max_epochs=40, n_task_experts=1).fit(
        X, {"positive": Y["positive"], "sum": Y["sum"]}
    )
    assert learned.score(X, {"positive": Y["positive"], "sum": Y["sum"]}) > 0.9


@pytest.mark.slow
@pytest.mark.parametrize("weighting", WEIGHTINGS)
def test_every_weighting_learns(weighting: str) -> None:
    targets = {name: Y[name] for name in ("positive", "sum")}
    assert model(weighting=weighting, max_epochs=40).fit(X, targets).score(X, targets) > 0.9


def test_equal_seeds_give_equal_models_and_others_do_not() -> None:
    first, second, other = (
        model(random_state=seed).fit(X, {"sum": Y["sum"]}).predict(X)["sum"] for seed in (0, 0, 1)
    )
    np.testing.assert_array_equal(first, second)
    assert not np.array_equal(first, other)


def test_a_target_may_be_missing_in_any_way() -> None:
    values, texts = Y["sum"].copy(), pd.Series(Y["positive"], dtype=object)
    values[::2] = np.nan
    texts[1::2] = None
    y = {"sum": values, "positive": texts}
    with_gaps = plain().fit(X, y)
    assert with_gaps.tasks_["positive"].classes.tolist() == ["no", "yes"]
    assert with_gaps.scores(X, y).keys() == {"sum", "positive"}
    integers = pd.array(np.where(np.arange(300) % 2, Y["place"], 0), dtype="Int64")
    integers[::2] = pd.NA
    floats = np.where(np.arange(300) % 2, Y["place"], np.nan)
    first, second = (
        plain().fit(X, {"place": given, "sum": Y["sum"]}).predict(X) for given in (integers, floats)
    )
    np.testing.assert_array_equal(first["sum"], second["sum"])


def test_the_mean_loss_of_an_epoch_is_that_of_the_labeled_rows() -> None:
    """With a learning rate of almost 0, it is the loss before and after the epoch."""
    place = np.where(FEW, Y["place"], np.nan)
    learned = plain(learning_rate=1e-9, batch_size=7)
    learned.fit(X, {"place": place, "sum": Y["sum"]})
    probabilities = learned.predict_proba(X)["place"][FEW]
    codes = np.searchsorted(learned.tasks_["place"].classes, place[FEW])
    expected = -np.log(probabilities[np.arange(len(codes)), codes]).mean()
    assert learned.history_[0]["train"]["place"] == pytest.approx(expected, rel=1e-4)


@pytest.mark.slow
def test_every_weighting_learns_a_task_with_few_labels_in_a_way_of_its_own() -> None:
    y = {"place": np.where(FEW, Y["place"], np.nan), "sum": Y["sum"]}
    settings = {"batch_size": 8, "max_epochs": 12, "validation_fraction": 0}
    predicted = []
    for weighting in WEIGHTINGS:
        learned = model(weighting=weighting, **settings).fit(X, y)
        scores = learned.scores(X, y)
        assert scores["sum"] > 0.9 and scores["place"] > 0.8, (weighting, scores)
        predicted.append(learned.predict(X)["sum"])
    for i, first in enumerate(predicted):
        for second in predicted[:i]:
            assert np.abs(first - second).max() > 0.01


def test_tasks_that_need_opposite_experts_need_a_gate_each() -> None:
    """Each task is an expert or its negative, by the sign of a column of its own.

    All tasks of one gate get the same number of each row, so their R² sum to 1 at most.
    """
    rows = np.random.default_rng(1).uniform(-1, 1, (600, 3))
    signs = {"first": np.sign(rows[:, 1]), "second": np.sign(rows[:, 2])}
    y = {name: sign * rows[:, 0] for name, sign in signs.items()}
    gated, shared = (
        model(architecture, expert_units=(1,), tower_units=(), n_experts=4, learning_rate=0.05)
        .set_params(max_epochs=60, validation_fraction=0)
        .fit(rows, y)
        .score(rows, y)
        for architecture in ("mmoe", "one_gate")
    )
    assert gated > 0.8 and shared <= 0.5


@pytest.mark.slow
def test_weight_decay_pulls_kernels_alone() -> None:
    frame = pd.DataFrame({"age": X[:, 0], "work": Y["positive"]})
    # a step halves what decays
    strong = {"learning_rate": 1e-6, "weight_decay": 5e5, "validation_fraction": 0}
    params = nnx.state(model("cross_stitch", **strong).fit(frame, {"sum": Y["sum"]}).model_)
    for name, param in by_name(params).items():
        if "stitches" in name:
            np.testing.assert_allclose(param, [[1.0]], atol=1e-3)
        elif "kernel" in name:
            assert np.abs(param).max() < 1e-4
        elif "embedding" in name:
            assert param.std() > 0.1
    layers = {"tasks": 2, "units": (3,), "experts": 2, "task_experts": 1, "layers": 2}
    for gate in ("softmax", "dselect_k"):
        config = BodyConfig(**layers, gate=gate, k=1)
        ple = new_model("ple", config, 4, {"a": 1, "b": 2}, (4,), rngs=nnx.Rngs(0))
        for name, chosen in by_name(decayed(nnx.state(ple))).items():
            assert chosen == ("kernel" in name and "gate" not in name)


def split_of(learned: MultiTaskEstimator, targets: dict[str, Any]) -> Data:
    """All rows, with the targets of some tasks."""
    every = np.ones(len(X), bool)
    codes = [jnp.asarray(task.encode(targets[k], every)) for k, task in learned.tasks_.items()]
    table = jax.device_put(learned._encoder.transform(X))
    return Data(table, tuple(codes), (jnp.asarray(every),) * len(codes))


def test_losses_are_those_of_the_predictions() -> None:
    targets = {name: Y[name] for name in ("sum", "place", "visits")}
    learned = plain(kinds=KINDS).fit(X, targets)
    data = split_of(learned, targets)
    labeled = jnp.asarray(np.arange(len(X)) % 3 == 0)
    data = data._replace(weights=(labeled, *data.weights[1:]))
    graph, params = nnx.split(learned.model_)
    losses_of = tuple(task.loss for task in learned.tasks_.values())
    trainer = Trainer(graph, losses_of, Weighting(), optax.sgd(0.1))
    losses = jax.jit(trainer.losses)(params, data)
    predicted, probabilities = learned.predict(X), learned.predict_proba(X)["place"]
    errors = ((predicted["sum"] - Y["sum"]) / Y["sum"].std())[np.asarray(labeled)]
    deviance = mean_poisson_deviance(Y["visits"], predicted["visits"])
    expected = [
        np.mean(errors**2),
        log_loss(Y["place"], probabilities),
        deviance / 2 / Y["visits"].mean(),
    ]
    np.testing.assert_allclose(losses.tasks, expected, rtol=1e-4)


def test_each_label_counts_alike_in_an_epoch_however_it_is_cut_into_batches() -> None:
    """The last batch has one row of its own, and one in four rows has a label of the second."""
    every, rngs, rate = np.ones(41, bool), nnx.Rngs(0), 1e-4
    tasks = (Regression("sum", Y["sum"][:41], every), Classification("place", Y["place"], FEW))
    towers = {task.name: nnx.Linear(6, task.size, rngs=rngs) for task in tasks}
    graph, params = nnx.split(MultiTask(SharedBottom(nnx.Linear(6, 6, rngs=rngs), 2), towers))
    encoded = tuple(jnp.asarray(task.encode(Y[task.name][:41], every)) for task in tasks)
    data = Data(jnp.asarray(X[:41]), encoded, (jnp.asarray(every), jnp.arange(41) % 4 == 0))
    losses_of = (Regression.loss, Classification.loss)
    trainer = Trainer(graph, losses_of, Weighting(), optax.sgd(rate))
    order = jnp.asarray(batches(np.random.default_rng(0), 41, 8))
    state, _ = jax.jit(trainer.epoch)(trainer.init(params), data, order)
    # six batches of eight rows have 41 / 8 times the gradient of the mean losses of all rows
    gradient = jax.jit(jax.grad(lambda params: trainer.losses(params, data).tasks.sum()))(params)
    moved = jax.tree.map(lambda before, after: (before - after) / rate, params, state.params)
    for one, each in zip(jax.tree.leaves(moved), jax.tree.leaves(gradient), strict=True):
        np.testing.assert_allclose(one, 41 / 8 * each, rtol=0.1, atol=0.02)


@pytest.mark.long_after(1)
@pytest.mark.parametrize(
    "weighting",
    [
        name if name in ("fixed", "gradnorm") else pytest.param(name, marks=pytest.mark.slow)
        for name in WEIGHTINGS
    ],
)
def test_two_steps_follow_the_gradients_with_the_weights_of_each_step(weighting: str) -> None:
    targets = {name: Y[name] for name in ("sum", "place")}
    learned = plain().fit(X, targets)
    data, (graph, params) = split_of(learned, targets), nnx.split(learned.model_)
    weigh, given = WEIGHTINGS[weighting](), jnp.array([0.5, 2.0])
    losses_of = (Regression.loss, Classification.loss)
    trainer = Trainer(graph, losses_of, weigh, optax.sgd(0.1))
    start = trainer.init(params, given)
    state, mean = jax.jit(trainer.epoch)(start, data, jnp.arange(len(X)).reshape(2, -1))

    def losses_of(params: Any, batch: Data) -> jax.Array:
        return trainer.losses(params, batch).tasks

    seen = []
    weights, expected = start.weighting, params
    for rows in np.arange(len(X)).reshape(2, -1):
        batch = jax.tree.map(lambda x, rows=rows: x[rows], data)
        losses = losses_of(expected, batch)
        each = jax.jit(jax.jacrev(losses_of))(expected, batch)
        squares = [np.square(x).reshape(2, -1).sum(1) for x in jax.tree.leaves(each.body)]
        norms = jnp.sqrt(sum(squares)) if weighting == "gradnorm" else jnp.zeros(2)
        factors = given * weigh.weights(weights)
        expected = jax.tree.map(
            lambda x, g, f=factors: x - 0.1 * jnp.tensordot(f, g, 1), expected, each
        )
        weights = weigh.step(weights, Losses(losses, jnp.zeros(()), jnp.ones(2)), norms)
        seen.append(losses)
    for a, b in zip(jax.tree.leaves(state.params), jax.tree.leaves(expected), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-3, atol=1e-5)
    np.testing.assert_allclose(mean.tasks, np.mean(seen, axis=0), rtol=1e-4)
    after = weigh.weights(weigh.epoch(weights, mean.tasks))
    np.testing.assert_allclose(weigh.weights(state.weighting), after, rtol=1e-4)
    if weighting in ("uncertainty", "gradnorm"):
        assert not np.allclose(after, 1)


def test_a_model_with_other_state_than_parameters_and_streams_is_not_trained() -> None:
    rngs = nnx.Rngs(0)
    normed = MultiTask(
        SharedBottom(nnx.Linear(6, 4, rngs=rngs), 1),
        {"sum": nnx.Sequential(nnx.Linear(4, 1, rngs=rngs), nnx.BatchNorm(1, rngs=rngs))},
    )
    graph, params = nnx.split(normed)
    trainer = Trainer(graph, (), Weighting(), optax.sgd(0.1))
    with pytest.raises(UsageError, match="towers/0/.* is not a parameter: models cannot have"):
        trainer.init(params)


def test_every_row_is_in_one_batch_of_an_epoch() -> None:
    order = batches(np.random.default_rng(0), 10, 4)
    assert order.shape == (3, 4)
    assert sorted(order[order >= 0].tolist()) == list(range(10))
    marked = ~order[order < 0]
    assert len(marked) == 2 and set(marked.tolist()) <= set(order[:2].ravel().tolist())
    assert batches(np.random.default_rng(0), 3, 8).shape == (1, 3)


def test_rows_that_fill_the_last_batch_are_no_copies_of_one_row() -> None:
    """So the loss of the gates is that of all rows; with one row it would be another."""
    rows = np.append(X[:40], X[:1] * 30, axis=0)
    settings = {"gate": "dselect_k", "learning_rate": 1e-9, "validation_fraction": 0}
    gates = [
        model(**settings, max_epochs=20, batch_size=size).fit(rows, {"sum": Y["sum"][:41]})
        for size in (40, 41)
    ]
    in_parts, at_once = (np.mean([row["gates"] for row in each.history_]) for each in gates)
    assert in_parts == pytest.approx(at_once, rel=0.05)


def test_the_validation_loss_in_parts_is_that_of_all_rows(monkeypatch: pytest.MonkeyPatch) -> None:
    split = (X[:130], {"sum": np.where(FEW, np.nan, Y["sum"])[:130]})
    whole = plain().fit(X, {"sum": Y["sum"]}, validation=split)
    monkeypatch.setattr(training, "EVAL_BATCH_SIZE", 32)
    training.compiled.cache_clear()
    parts = plain().fit(X, {"sum": Y["sum"]}, validation=split)
    assert parts.history_[0]["validation"]["sum"] == pytest.approx(
        whole.history_[0]["validation"]["sum"], rel=1e-5
    )


def test_task_weights_are_relative() -> None:
    """Adam does not see a common factor of all losses."""
    y = {"sum": Y["sum"], "positive": Y["positive"]}
    none, equal, unequal = (
        model(task_weights=weights).fit(X, y).predict(X)["sum"]
        for weights in (None, {"sum": 4.0, "positive": 4.0}, {"positive": 16.0})
    )
    np.testing.assert_allclose(none, equal, rtol=0.01, atol=0.01)
    assert np.abs(none - unequal).max() > 0.1


def test_training_ends_when_the_validation_loss_rises_and_keeps_the_best_epoch() -> None:
    noise = {"noise": RANDOM.normal(size=len(X))}
    learned = model(max_epochs=200, patience=3, learning_rate=0.03).fit(X, noise)
    losses = [row["validation"]["noise"] for row in learned.history_]
    assert len(losses) < 200
    assert learned.n_epochs_ == 1 + int(np.argmin(losses)) == len(losses) - 3


def test_the_given_validation_split_is_used() -> None:
    split = (X[:50], {"sum": Y["sum"][:50]})
    learned = plain(max_epochs=3).fit(X[50:], {"sum": Y["sum"][50:]}, validation=split)
    errors = (learned.predict(X[:50])["sum"] - Y["sum"][:50]) / learned.tasks_["sum"].std
    best = learned.history_[learned.n_epochs_ - 1]["validation"]["sum"]
    assert best == pytest.approx(np.mean(errors**2), rel=1e-4)


def test_tables_have_columns_of_numbers_and_of_categories() -> None:
    frame = pd.DataFrame({"age": X[:, 0], "work": np.where(X[:, 1] > 0, "office", "field")})
    target = {"office": (frame["work"] == "office").to_numpy()}
    learned = model(max_epochs=30).fit(frame, target)
    assert learned.scores(frame, target) == {"office": 1.0}
    assert learned.feature_names_in_.tolist() == ["age", "work"]
    codes = np.column_stack([X[:, 0], X[:, 1] > 0])
    by_index = model(max_epochs=30, categorical=[1]).fit(codes, target)
    assert by_index.scores(codes, target) == {"office": 1.0}
    assert [len(each) for each in by_index._encoder.vocabularies] == [2]
    with pytest.raises(ValueError, match="feature names should match"):
        learned.predict(frame[["work", "age"]])


def test_a_category_that_is_unseen_or_missing_has_the_vector_zero_unless_it_was_learned() -> None:
    work = pd.Series(np.where(X[:, 1] > 0, "office", "field"), dtype=object)
    frame = pd.DataFrame({"age": X[:, 0], "work": work})
    target = {"office": (work == "office").to_numpy()}
    learned = plain(max_epochs=2).fit(frame, target)
    vectors = learned.model_.inputs.vectors[0].embedding[...]
    np.testing.assert_array_equal(vectors[2], 0)
    first, second, third = (
        learned.predict_proba(frame.assign(work=given).iloc[:3])["office"]
        for given in ("sea", None, pd.NA)
    )
    np.testing.assert_array_equal(first, second)
    np.testing.assert_array_equal(first, third)
    with_gaps = plain(max_epochs=2).fit(frame.assign(work=work.where(X[:, 0] > 0)), target)
    assert np.abs(with_gaps.model_.inputs.vectors[0].embedding[...][2]).min() > 0


@pytest.mark.parametrize(
    "values", [pd.Categorical(["a", "b", None] * 100), pd.array([True, None, False] * 100)]
)
def test_columns_of_pandas_own_types_are_categories(values: Any) -> None:
    frame = pd.DataFrame({"age": X[:, 0], "column": values})
    learned = plain().fit(frame, {"sum": Y["sum"]})
    assert [len(each) for each in learned._encoder.vocabularies] == [2]
    assert np.isfinite(learned.predict(frame)["sum"]).all()


def test_expert_use_sums_to_one_and_names_own_and_shared_experts(
    fitted: MultiTaskEstimator,
) -> None:
    use = fitted.expert_use(X)
    assert list(use) == list(Y)
    for shares in use.values():
        assert shares.shape == (3,)
        assert shares.sum() == pytest.approx(1, rel=1e-5)
    cgc = model(architecture="cgc", n_task_experts=1).fit(X, {"a": Y["sum"], "b": Y["place"]})
    cgc.set_params(n_experts=7)  # for the next fit
    assert cgc.expert_names_ == ["a 0", "b 0", "shared 0", "shared 1", "shared 2"]
    assert cgc.expert_use(X)["a"][1] == 0
    assert cgc.expert_use(X)["a"].sum() == pytest.approx(1, rel=1e-5)
    with pytest.raises(ValueError, match="the model has no gates"):
        model(architecture="shared_bottom").fit(X, {"a": Y["sum"]}).expert_use(X)


def test_the_picture_has_a_row_for_each_task(fitted: MultiTaskEstimator) -> None:
    ax = plot_expert_use(fitted, X)
    assert [label.get_text() for label in ax.get_yticklabels()] == list(Y)
    assert len(ax.texts) == 3 * len(Y)
    plt.close("all")


def test_experts_without_parameters_are_reported() -> None:
    layers = BodyConfig(tasks=2, units=(), experts=2)
    empty = new_model("mmoe", layers, 3, {"a": 1, "b": 2}, (), rngs=nnx.Rngs(0))
    assert list(equal_experts(empty)) == [
        "experts of body/experts are equal: they have no parameters"
    ]


def test_experts_that_start_equal_are_reported() -> None:
    def same(width: int, *, rngs: nnx.Rngs) -> nnx.Module:
        return nnx.Linear(width, 4, rngs=nnx.Rngs(0))

    found = [
        "experts 0 of body/experts and 1 of body/experts are equal: use different seeds",
        "experts 0 of body/experts and 2 of body/experts are equal: use different seeds",
    ]
    with pytest.warns(UserWarning) as warnings:
        learned = model(expert=same).fit(X, {"sum": Y["sum"]})
    assert [str(warning.message) for warning in warnings] == found
    assert learned.findings(X) == found


def test_an_expert_that_no_task_uses_is_reported(fitted: MultiTaskEstimator) -> None:
    copy = pickle.loads(pickle.dumps(fitted))
    for gate in copy.model_.body.gates:
        gate.logits.kernel[...] = jnp.zeros_like(gate.logits.kernel[...])
    assert copy.findings(X) == []
    for gate in copy.model_.body.gates:
        gate.logits = nnx.Linear(6, 3, rngs=nnx.Rngs(0))
        gate.logits.bias[...] = jnp.array([0.0, -50.0, 0.0])
    assert copy.findings(X) == ["no task uses expert 1: its mean weight is at most 0.000"]


def test_an_expert_that_no_task_uses_is_one_of_those_that_a_gate_sees() -> None:
    """Of 4 experts in all, the gate of a task of CGC sees its own and the shared one."""
    tasks = {"sum": Y["sum"], "place": Y["place"], "positive": Y["positive"]}
    learned = model(architecture="cgc", n_experts=1, n_task_experts=1, max_epochs=1).fit(X, tasks)
    for gate in learned.model_.body.layers[0].gates:  # weights 0.96 and 0.04 of every row
        gate.logits = nnx.Linear(6, 2, kernel_init=nnx.initializers.zeros, rngs=nnx.Rngs(0))
        gate.logits.bias[...] = jnp.array([np.log(0.96), np.log(0.04)])
    assert learned.findings(X) == ["no task uses expert shared 0: its mean weight is at most 0.040"]


def test_a_model_without_gates_has_no_findings_of_their_use() -> None:
    assert (
        model(architecture="cross_stitch", max_epochs=1).fit(X, {"a": Y["sum"]}).findings(X) == []
    )


def test_a_progress_line_names_the_epoch_and_the_losses(capsys: pytest.CaptureFixture) -> None:
    model(verbose=1, max_epochs=2).fit(X, {"sum": Y["sum"]})
    first, _ = capsys.readouterr().out.splitlines()
    assert first.startswith("epoch 1/2  train sum 0.") or first.startswith(
        "epoch 1/2  train sum 1."
    )
    assert "  validation sum " in first


def test_it_is_an_estimator_of_scikit_learn(fitted: MultiTaskEstimator) -> None:
    settings = clone(fitted).get_params()
    assert settings["n_experts"] == 3 and settings["architecture"] == "mmoe"
    again = pickle.loads(pickle.dumps(fitted))
    np.testing.assert_array_equal(again.predict(X)["sum"], fitted.predict(X)["sum"])


def test_a_classifier_takes_fractions_as_classes_and_is_as_good_as_a_plain_model() -> None:
    classes = np.where(X[:, 0] > 0, 0.5, 1.5)
    learned = MultiTaskClassifier(max_epochs=40, learning_rate=0.01, random_state=0).fit(
        X, {"half": classes}
    )
    assert isinstance(learned.tasks_["half"], Classification)
    plain = LogisticRegression().fit(X, classes.astype(str)).score(X, classes.astype(str))
    assert learned.scores(X, {"half": classes})["half"] > plain - 0.02


def test_a_failed_fit_leaves_the_model_of_the_last_one() -> None:
    learned = plain().fit(X, {"sum": Y["sum"]})
    before = learned.predict(X)["sum"]
    with pytest.raises(ValueError, match="all targets are missing"):
        learned.fit(X[:, :4], {"place": Y["place"], "none": np.full(300, np.nan)})
    np.testing.assert_array_equal(learned.predict(X)["sum"], before)
    with pytest.raises(ValueError, match="X has 4 features, but .* is expecting 6"):
        learned.predict(X[:, :4])


def test_rows_are_predicted_in_parts_of_any_number(monkeypatch: pytest.MonkeyPatch) -> None:
    learned = plain().fit(X, {"sum": Y["sum"]})
    whole = learned.predict(X)["sum"]
    monkeypatch.setattr(estimator, "EVAL_BATCH_SIZE", 128)
    np.testing.assert_allclose(learned.predict(X)["sum"], whole, rtol=1e-5)
    np.testing.assert_allclose(learned.predict(X[:1])["sum"], whole[:1], rtol=1e-5)


@pytest.mark.parametrize("kind", ["Int64", "UInt64", "int64[pyarrow]", "category", "list"])
def test_large_integers_stay_apart_where_one_is_missing(kind: str) -> None:
    ids = [2**60, 2**60 + 1, 5, None] * 5
    wanted = [5, 2**60, 2**60 + 1]
    given: Any = ids if kind == "list" else pd.Series(pd.array(ids, dtype="Int64"))
    given = given if kind == "list" else given.astype(kind)
    (targets,) = targets_of({"id": given}, 20).values()
    task = Classification("id", targets, ~is_missing(targets))
    np.testing.assert_array_equal(task.classes, wanted)
    assert task.classes.dtype == (np.uint64 if kind == "UInt64" else np.int64)
    frame = pd.DataFrame({"age": X[:20, 0]})
    frame["id"] = pd.Series(given, dtype=object) if kind == "list" else given
    encoder = TableEncoder()
    codes = encoder.fit_transform(frame, ["id"]).codes
    assert [len(each) for each in encoder.vocabularies] == [3]
    np.testing.assert_array_equal(codes[:4, 0], [1, 2, 0, 3])
    np.testing.assert_array_equal(encoder.transform(frame).codes, codes)
    encoder.fit_transform(rows_of([[2**60, 0.5], [2**60 + 1, 0.25]]), [0])
    assert [len(each) for each in encoder.vocabularies] == [2]


def test_a_table_of_arrow_is_read_with_its_names() -> None:
    frame = pd.DataFrame({"age": X[:, 0], "work": Y["positive"]})
    targets = pd.DataFrame({"place": Y["place"], "sum": Y["sum"]})
    rows, y = pyarrow.Table.from_pandas(frame), pyarrow.Table.from_pandas(targets)
    learned = plain().fit(rows, y)
    assert learned.feature_names_in_.tolist() == ["age", "work"]
    assert list(learned.tasks_) == ["place", "sum"]
    predicted = learned.predict(frame)
    for same in (rows, rows.combine_chunks().to_batches()[0]):
        np.testing.assert_array_equal(learned.predict(same)["sum"], predicted["sum"])
    assert learned.scores(rows, y) == learned.scores(frame, targets)


def test_a_table_of_arrow_without_pandas_gets_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "pandas", None)
    with pytest.raises(UsageError, match="data of pyarrow is read by pandas: pip install pandas"):
        model().fit(pyarrow.table({"a": [1.0]}), {"sum": [1.0]})


def test_numbers_that_are_many_classes_by_default_get_a_warning() -> None:
    prices = {"price": np.random.default_rng(0).integers(0, 40, 300)}
    _, (problem,) = new_tasks(
        model(), Split(X, prices, None, np.arange(300)), ()
    )  # which fit warns of: see the next test
    assert problem.startswith("task 'price': ")
    assert problem.endswith("kinds={'price': \"classification\"} says so")
    for settled, targets, categories in (
        (model(kinds={"price": "classification"}), prices, ()),
        (model(), prices, {"price"}),  # of pandas' type "category"
        (MultiTaskClassifier(), prices, ()),
        (model(), {"price": prices["price"] % 30}, ()),
        (model(), {"price": prices["price"].astype(str)}, ()),
    ):
        assert not new_tasks(settled, Split(X, targets, None, np.arange(len(X))), categories)[1]


def test_many_classes_of_few_rows_get_a_warning() -> None:
    with pytest.warns(UserWarning, match=r"MultiTaskEstimator\(kinds={'a': \"regression\"}\)"):
        plain().fit(X[:30], {"a": np.arange(30) % 20})


WRONG: list[tuple[str, Any, dict[str, Any]]] = [
    ("there is no task", {}, {}),
    ("the name of a task is 1: use a string", {1: Y["sum"]}, {}),
    ("two tasks 'a'", pd.DataFrame(np.stack([X[:, 0]] * 2, 1), columns=["a", "a"]), {}),
    (r"task 'a': targets of shape \(299,\) for 300 rows", {"a": Y["sum"][1:]}, {}),
    ("task 'a': all targets are missing", {"a": np.full(300, np.nan)}, {}),
    ("task 'a': all targets are 1, 1 class: leave the task out", {"a": np.ones(300, int)}, {}),
    ("task 'a': all targets are 0.1: leave the task out", {"a": np.full(300, 0.1)}, {}),
    (
        r"task 'a': values of several types: 2 \(number\) and 'u' \(str\): convert them to one",
        {"a": [1, "u", 2] * 100},
        {},
    ),
    ("task 'a': a value is a tuple: give single values", {"a": [(1, 2), (3, 4)] * 150}, {}),
    (
        r"task 'a': values such as 2j cannot be sorted: convert them to str",
        {"a": [1j, 2j] * 150},
        {},
    ),
    (
        r"task 'a': values of several types: .* \(datetime\) and .* \(datetime with a time zone\)",
        {"a": [pd.Timestamp(0), pd.Timestamp(0, tz="UTC")] * 150},
        {},
    ),
    ("task 'a': a number has no float64 .int too large", {"a": [10**400, 1] * 150}, {}),
    ("task 'a': a number has no float64", {"a": [10**400] * 300}, {"kinds": {"a": "regression"}}),
    ("task 'a': a number has no float64", {"a": [Decimal("sNaN"), Decimal(1)] * 150}, {}),
    ("task 'a': a value is infinite", {"a": np.where(X[:, 0] > 0, np.inf, 1)}, {}),
    ("task 'a': NoneType: give an array or a list", {"a": None}, {}),
    ("task 'a': generator: give an array", {"a": (i for i in range(300))}, {}),
    ("task 'a': a value is a list: give single values", {"a": [[1], [2, 3], [4]] * 100}, {}),
    ("task 'a': a value is a dict: give single values", {"a": [{}] * 300}, {}),
    ("task 'a': targets of standard deviation 0.0: scale", {"a": 1e-300 * Y["sum"]}, {}),
    ("kinds: task 'a': '': use classification", {"a": Y["sum"]}, {"kinds": {"a": ""}}),
    ("task 'a': '(yes|no)' is not a number", {"a": Y["positive"]}, {"kinds": {"a": "regression"}}),
    (
        "task 'a': .* is no count: counts are integers from 0",
        {"a": Y["sum"]},
        {"kinds": {"a": "count"}},
    ),
    ("task 'a': 'rank': use classification, ", {"a": Y["sum"]}, {"kinds": {"a": "rank"}}),
    ("kinds: there is no task 'b'", {"a": Y["sum"]}, {"kinds": {"b": "count"}}),
    ("task_weights: there is no task 'b'", {"a": Y["sum"]}, {"task_weights": {"b": 2.0}}),
    ("task_weights: task 'a': nan: use a pos", {"a": Y["sum"]}, {"task_weights": {"a": np.nan}}),
    ("'architecture' parameter", {"a": Y["sum"]}, {"architecture": "moe"}),
    (r"expert_units=\(0,\): use integers from 1 on", {"a": Y["sum"]}, {"expert_units": (0,)}),
    (r"expert_units=\(\): experts without a layer", {"a": Y["sum"]}, {"expert_units": ()}),
    (
        "give at least one, and leave out expert",
        {"a": Y["sum"]},
        {"architecture": "cross_stitch", "expert": nnx.Linear},
    ),
    ("k=50: use 1 to 3, the number", {"a": Y["sum"]}, {"gate": "dselect_k", "k": 50}),
    ("use a lower learning_rate", {"a": Y["sum"]}, {"learning_rate": 1e30}),
    ("validation_fraction=0.001 of 300 rows is 0", {"a": Y["sum"]}, {"validation_fraction": 0.001}),
    (
        "task 'a': no validation row has a target",
        {"a": np.where(np.arange(300) == 0, 1.5, np.where(np.arange(300) == 1, 2.5, np.nan))},
        {},
    ),
]


@pytest.mark.parametrize(("message", "y", "settings"), WRONG)
def test_wrong_targets_and_settings_get_one_line(
    message: str, y: Any, settings: dict[str, Any]
) -> None:
    with pytest.raises(ValueError, match=message) as error:
        model(**settings).fit(X, y)
    if "parameter" not in message:
        assert "\n" not in str(error.value)


def with_value(value: Any) -> Any:
    frame = pd.DataFrame(X, columns=list("pqrstu")).astype(object)
    frame.iloc[3, 2] = value
    return frame


WRONG_ROWS: list[tuple[str, Any, dict[str, Any]]] = [
    ("X is sparse: give a dense array", csr_array(X), {}),
    ("X has 1 axes: Reshape your data to rows", X[:, 0], {}),
    ("X has 0 rows", X[:0], {}),
    ("column 'r': 1 of .* values are missing .NaN.: fill them in", with_value(np.nan), {}),
    ("column 'r': a value is infinite", with_value(np.inf), {}),
    ("column 'r': a number has no float64", with_value(10**400), {}),
    (
        "column 'r': a value is too far from those of fit for float32",
        with_value(1e300),
        {"validation_fraction": 0.5},
    ),
    (
        "column 'r': 'much' is not a number: name the column",
        with_value("much"),
        {"categorical": []},
    ),
    (
        r"column 'r': values of several types: .* \(number\) and 'much' \(str\): convert them",
        with_value("much"),
        {},
    ),
    ("X: Complex data not supported", X[:, :2].astype(complex), {"categorical": [0, 1]}),
    ("column 0: .* cannot be sorted", pd.DataFrame(X[:, :2].astype(complex)), {}),
    ("column 'r': a value is a set: give single values", with_value({1}), {}),
    ("X: the rows have different lengths", [[1, 2], [3]], {}),
    (r"X has 0 feature\(s\) \(shape=\(300, 0\)\) while", X[:, :0], {}),
    ("X has 1 axes", pd.Series(X[:, 0]), {}),
    ("X: there are two columns 'p': rename one", pd.DataFrame(X[:, :2], columns=["p", "p"]), {}),
    ("X: column 0: 'u' is not a number: name the column", [["u", 1.5], ["v", 2]], {}),
    ("X: column 0: 1 of 3 values are missing", np.ma.masked_equal([[9], [1], [2]], 9), {}),
    ("categorical=", X, {"categorical": ["age"]}),
]


@pytest.mark.parametrize(("message", "rows", "settings"), WRONG_ROWS)
def test_wrong_rows_get_one_line(message: str, rows: Any, settings: dict[str, Any]) -> None:
    targets = {"sum": Y["sum"][: rows.shape[0] if hasattr(rows, "shape") else len(rows)]}
    with pytest.raises(ValueError, match=message) as error:
        model(**{"validation_fraction": 0, **settings}).fit(rows, targets)
    assert "\n" not in str(error.value)


def test_wrong_calls_of_a_fitted_model_get_one_line(fitted: MultiTaskEstimator) -> None:
    with pytest.raises(ValueError, match="features"):
        fitted.predict(X[:, :4])
    with pytest.raises(ValueError, match=r"there is no task 'age', only \['positive', 'place'"):
        fitted.scores(X, {**Y, "age": Y["place"]})
    with pytest.raises(
        ValueError, match="task 'place': all targets are missing: leave the task out"
    ):
        fitted.scores(X, {**Y, "place": np.full(300, np.nan)})
    with pytest.raises(ValueError, match="a target is too far from the learned mean for float32"):
        model().fit(X, {"sum": Y["sum"]}, validation=(X, {"sum": 1e300 * Y["sum"]}))
    with pytest.raises(
        ValueError, match=r"y of the validation rows has the tasks \['place'\]: expected \['sum'\]"
    ):
        model().fit(X, {"sum": Y["sum"]}, validation=(X, {"place": Y["place"]}))
    with pytest.raises(ValueError, match="task 'visits': all targets are 0: D² is undefined"):
        fitted.scores(X, {**Y, "visits": np.zeros(300)})
    with pytest.raises(ValueError, match="task 'sum': all targets are 1: R² is undefined"):
        fitted.scores(X, {**Y, "sum": np.ones(300)})
    with pytest.raises(ValueError, match="targets of type number, and the classes are of type str"):
        fitted.scores(X, {**Y, "positive": X[:, 0] > 0})
    with pytest.raises(NotFittedError):
        model().findings(X)
    with pytest.raises(ValueError, match="class 9 was in no target when the classes were"):
        model().fit(X, {"place": Y["place"]}, validation=(X, {"place": np.full(300, 9)}))
    with pytest.raises(ValueError, match="validation: give a tuple of X and y"):
        model().fit(X, {"place": Y["place"]}, validation=X)


def test_scores_are_of_the_given_tasks_and_count_new_classes_as_errors(
    fitted: MultiTaskEstimator,
) -> None:
    half = np.where(np.arange(300) % 2, Y["place"], 9)
    predicted = fitted.predict(X)["place"]
    assert fitted.scores(X, {"place": half}) == {"place": np.mean(predicted == half)}


def test_masked_targets_are_missing() -> None:
    place = np.ma.masked_array(np.where(FEW, 9, Y["place"]), mask=FEW)
    learned = plain().fit(X, {"place": place})
    assert learned.tasks_["place"].classes.tolist() == [0, 1, 2]


def test_columns_of_one_value_get_a_warning_that_names_them() -> None:
    frame = pd.DataFrame({"age": X[:, 0], "year": 1994.0, "place": "sea"})
    with pytest.warns(
        UserWarning, match="these columns have one value only: leave them out: 'year', 'place'"
    ):
        plain().fit(frame, {"sum": Y["sum"]})


def test_categories_of_another_type_than_in_fit_are_refused() -> None:
    frame = pd.DataFrame({"age": X[:, 0], "code": pd.Categorical(Y["place"])})
    learned = plain(categorical=["code"]).fit(frame, {"sum": Y["sum"]})
    message = "column 'code': categories of type str, and in fit they were of type number"
    with pytest.raises(ValueError, match=message):
        learned.predict(frame.assign(code=[str(code) for code in Y["place"]]))


def test_dates_are_equal_in_any_unit_and_never_numbers() -> None:
    dates = pd.Series(np.datetime64("2020-01-01") + np.arange(300) % 5)
    learned = plain().fit(pd.DataFrame({"age": X[:, 0], "day": dates}), {"sum": Y["sum"]})
    for same in (*(dates.astype(f"datetime64[{unit}]") for unit in ("s", "ns")), list(dates)):
        codes = learned._encoder.transform(pd.DataFrame({"age": X[:, 0], "day": same})).codes
        np.testing.assert_array_equal(codes[:, 0], np.arange(300) % 5)
    with pytest.raises(ValueError, match="'day': categories of type number, and in fit .* datetim"):
        learned.predict(pd.DataFrame({"age": X[:, 0], "day": np.zeros(300)}))


@pytest.mark.parametrize("unit", ["D", "ns"])
def test_classes_that_are_dates_keep_their_unit(unit: str) -> None:
    days = (np.datetime64("2020-01-01") + Y["place"]).astype(f"datetime64[{unit}]")
    learned = plain().fit(X, {"day": days})
    predicted = learned.predict(X)["day"]
    assert predicted.dtype == days.dtype
    assert learned.scores(X, {"day": list(pd.Series(days))})["day"] == np.mean(predicted == days)


def test_rows_without_any_category_are_predicted_as_missing() -> None:
    frame = pd.DataFrame({"age": X[:, 0], "work": Y["positive"]})
    learned = plain().fit(frame, {"sum": Y["sum"]})
    expected = learned.predict(frame.assign(work=None).iloc[:1])["sum"]
    for missing in (np.nan, pd.NA, pd.NaT):
        one = pd.DataFrame([{"age": X[0, 0], "work": missing}])
        np.testing.assert_array_equal(learned.predict(one)["sum"], expected)


def test_what_pandas_calls_a_category_is_one_even_if_it_is_a_number() -> None:
    frame = pd.DataFrame({"age": X[:, 0], "place": pd.Series(Y["place"]).astype("category")})
    halves = pd.Series(Y["place"] / 2).astype("category")
    learned = plain().fit(frame, {"half": halves, "sum": Y["sum"]})
    assert [len(each) for each in learned._encoder.vocabularies] == [3]
    assert [type(task) for task in learned.tasks_.values()] == [Classification, Regression]
    named = plain(kinds={"half": "regression"}).fit(frame, {"half": halves})
    assert isinstance(named.tasks_["half"], Regression)


def test_decimals_are_numbers() -> None:
    decimals = pd.Series([Decimal(str(round(x, 4))) for x in X[:, 0]])
    tenths = pd.Series([Decimal(int(place)) / 10 for place in Y["place"]])
    frame = pd.DataFrame({"a": decimals, "tenths": tenths})
    named = plain(categorical=["tenths"])
    for learned in (plain(), named):
        learned.fit(frame, {"sum": decimals})
        assert isinstance(learned.tasks_["sum"], Regression)
        np.testing.assert_array_equal(
            learned.predict(frame.astype(float))["sum"], learned.predict(frame)["sum"]
        )
    np.testing.assert_array_equal(named._encoder.transform(frame).codes[:, 0], Y["place"])


def test_numbers_that_are_text_get_a_warning_unless_they_are_named() -> None:
    frame = pd.DataFrame({"age": X[:, 0], "text": X[:, 1].astype(str), "few": Y["positive"]})
    message = "more categories than half the number of rows: .* in categorical: 'text'$"
    with pytest.warns(UserWarning, match=message):
        plain().fit(frame, {"sum": Y["sum"]})
    plain(categorical=["text", "few"]).fit(frame, {"sum": Y["sum"]})


def test_the_validation_split_has_a_share_of_each_class_and_of_missing_targets() -> None:
    def shares(targets: dict[str, Any], chosen: np.ndarray) -> list[int]:
        learned = model(validation_fraction=0.1)
        found = []
        for seed in range(20):
            random = np.random.default_rng(seed)
            given = Split(X, targets, None, np.arange(len(X)))
            tasks, _ = new_tasks(learned, given, ())
            labels = given.data(tasks, {}, "training")
            training, validation = drawn(tasks, labels, 0.1, random)
            assert sorted([*training, *validation]) == list(range(len(chosen)))
            assert len(validation) == len(chosen) // 10
            found.append(int(chosen[validation].sum()))
        return found

    rare = X[:, 0] > np.sort(X[:, 0])[-13]  # 12 of 300 rows
    assert set(shares({"rare": rare, "sum": Y["sum"]}, rare)) <= {1, 2}
    sometimes = np.where(rare, Y["sum"], np.nan)
    assert set(shares({"sometimes": sometimes, "place": Y["place"]}, rare)) <= {1, 2}
    # in each group of the first task, as many rows as lie between two validation rows
    group, tenth = np.repeat(np.arange(60), 10), np.tile(np.arange(10) == 9, 60)
    found = shares({"group": group.astype(str), "tenth": tenth}, tenth)
    assert min(found) > 0 and max(found) < 15


def test_a_column_without_a_category_in_fit_has_none_later() -> None:
    empty = pd.Series([None] * 300).astype("category")
    with pytest.warns(UserWarning, match="one value only"):
        learned = plain().fit(pd.DataFrame({"age": X[:, 0], "work": empty}), {"sum": Y["sum"]})
    for work in (Y["place"], Y["positive"]):
        codes = learned._encoder.transform(pd.DataFrame({"age": X[:, 0], "work": work})).codes
        np.testing.assert_array_equal(codes, 0)


def test_a_kind_that_is_a_list_is_refused() -> None:
    with pytest.raises(ValueError, match="kinds: task 'a': .'count'.: use classification, regress"):
        MultiTaskEstimator().set_params(kinds={"a": ["count"]}).fit(X, {"a": Y["visits"]})


def test_a_classifier_refuses_other_kinds() -> None:
    with pytest.raises(ValueError, match="'count': use classification or MultiTaskEstimator"):
        MultiTaskClassifier(kinds={"a": "count"}).fit(X, {"a": Y["visits"]})


@pytest.mark.slow
def test_a_search_chooses_the_setting_that_learns() -> None:
    frame = pd.DataFrame({"sum": Y["sum"]})
    search = GridSearchCV(plain(max_epochs=20), {"learning_rate": [1e-6, 0.01]}, cv=2)
    assert search.fit(X, frame).best_params_ == {"learning_rate": 0.01}
