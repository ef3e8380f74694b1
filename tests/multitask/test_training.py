"""How training ends, what a row counts, and which programs are compiled for it."""

import itertools
import logging
from typing import Any

import jax
import jax.numpy as jnp
import matplotlib.pyplot as plt
import numpy as np
import optax
import pandas as pd
import pytest
from flax import nnx
from sklearn.metrics import f1_score, log_loss, mean_absolute_error, roc_auc_score
from sklearn.model_selection import GridSearchCV
from sklearn.utils.class_weight import compute_sample_weight

from vmoe.multitask import MultiTask, MultiTaskEstimator, SharedBottom, plot_history
from vmoe.multitask.tasks import Regression
from vmoe.multitask.training import PROGRAMS, Data, Trainer, adamw, compiled, with_numbers
from vmoe.multitask.weighting import Weighting

RANDOM = np.random.default_rng(0)
X = RANDOM.normal(size=(200, 4))
NOISE = RANDOM.normal(size=200)
Y: dict[str, Any] = {
    "rare": np.where(X[:, 0] + NOISE > 1.6, "yes", "no"),
    "sum": X[:, 0] * 3 + X[:, 3] * 2 + 10,
}
HELD_OUT = (X[:80], {name: each[:80] for name, each in Y.items()})
TRAIN = (X[80:], {name: each[80:] for name, each in Y.items()})


def plain(**settings: Any) -> MultiTaskEstimator:
    """A model whose programs are small; tests share them."""
    defaults: dict[str, Any] = {
        "expert_units": (4,),
        "tower_units": (),
        "validation_fraction": 0,
        "learning_rate": 0.01,
        "batch_size": 32,
        "max_epochs": 3,
        "random_state": 0,
    }
    return MultiTaskEstimator("shared_bottom", **{**defaults, **settings})


@pytest.fixture(scope="module")
def watched() -> MultiTaskEstimator:
    learned = plain(monitor=("rare", "roc_auc"), max_epochs=40, patience=5, learning_rate=0.05)
    return learned.fit(*TRAIN, validation=HELD_OUT)


def test_the_epoch_with_the_best_metric_of_the_monitored_task_is_kept(
    watched: MultiTaskEstimator,
) -> None:
    monitored = [row["monitor"] for row in watched.history_]
    assert watched.n_epochs_ == 1 + int(np.argmax(monitored)) == len(monitored) - 5 < 35
    losses = [sum(row["validation"].values()) for row in watched.history_]
    assert watched.n_epochs_ != 1 + int(np.argmin(losses))
    rows, targets = HELD_OUT
    probability = watched.predict_proba(rows)["rare"][:, 1]
    assert max(monitored) == pytest.approx(roc_auc_score(targets["rare"] == "yes", probability))


@pytest.mark.slow
def test_the_loss_of_one_task_can_be_monitored() -> None:
    learned = plain(monitor=("rare", "loss"), max_epochs=80, patience=4, learning_rate=0.5)
    history = learned.fit(*TRAIN, validation=HELD_OUT).history_
    losses = [row["validation"]["rare"] for row in history]
    assert [row["monitor"] for row in history] == losses
    assert learned.n_epochs_ == 1 + int(np.argmin(losses)) == len(losses) - 4


def test_the_history_has_losses_scores_and_seconds_of_each_epoch(
    watched: MultiTaskEstimator,
) -> None:
    rows, targets = HELD_OUT
    kept = watched.history_[watched.n_epochs_ - 1]
    assert kept["scores"] == pytest.approx(watched.scores(rows, targets))
    seconds = [row["seconds"] for row in watched.history_]
    assert seconds == sorted(seconds) and seconds[0] > 0


def test_the_curves_have_a_panel_for_each_task(watched: MultiTaskEstimator) -> None:
    axes = plot_history(watched)
    assert [ax.get_title() for ax in axes] == ["rare", "sum"]
    for ax, name in zip(axes, Y, strict=True):
        curves = {line.get_label(): line.get_ydata() for line in ax.lines}
        for split in ("train", "validation"):
            np.testing.assert_array_equal(
                curves[split], [row[split][name] for row in watched.history_]
            )
    labels = [ax.get_ylabel() for ax in axes[0].figure.axes]
    assert labels == ["loss", "loss", "accuracy", "r2"]
    plt.close("all")


@pytest.mark.parametrize(
    ("message", "settings"),
    [
        ("monitor: there is no task 'age', only .'rare', 'sum'.", {"monitor": ("age", "loss")}),
        ("The 'monitor' parameter of .* must be a str among", {"monitor": "rare"}),
        (
            r"monitor=\('rare',\): use 'loss', or a tuple of a task and a metric",
            {"monitor": ("rare",)},
        ),
        ("task 'rare': r3: 'r3' is not a valid scoring value", {"monitor": ("rare", "r3")}),
        ("task 'sum': roc_auc: ", {"monitor": ("sum", "roc_auc")}),
        ("scoring: there is no task 'age'", {"scoring": {"age": "r2"}}),
        ("task 'sum': f1: ", {"scoring": {"sum": "f1"}}),
        ("class_weight: task 'sum' is no classification", {"class_weight": {"sum": "balanced"}}),
        (
            "class_weight: task 'rare': there is no class 7, only",
            {"class_weight": {"rare": {7: 1}}},
        ),
        ("class 'yes': -1: use a number from 0 on", {"class_weight": {"rare": {"yes": -1}}}),
        ("task 'rare': 3: use \"balanced\" or a dict", {"class_weight": {"rare": 3}}),
        ("'fixed' has no setting 'alpha', only ..", {"weighting_params": {"alpha": 1.0}}),
        (
            "alpha=0.0: use a positive number",
            {"weighting": "gradnorm", "weighting_params": {"alpha": 0.0}},
        ),
    ],
)
def test_wrong_settings_of_training_get_one_line(message: str, settings: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=message) as error:
        plain(**settings).fit(*TRAIN, validation=HELD_OUT)
    assert "\n" not in str(error.value)


def test_a_metric_without_validation_rows_is_refused() -> None:
    with pytest.raises(ValueError, match="needs validation rows: use a validation_fraction above"):
        plain(monitor=("rare", "roc_auc")).fit(*TRAIN)


def test_callbacks_see_each_epoch_and_can_end_training() -> None:
    seen: list[dict[str, Any]] = []
    learned = plain(max_epochs=9)
    learned.fit(*TRAIN, callbacks=[seen.append, lambda row: row["epoch"] == 4])
    assert seen == learned.history_
    assert [row["epoch"] for row in seen] == [1, 2, 3, 4]
    assert learned.n_epochs_ == 4


def test_a_progress_line_has_scores_and_seconds(capsys: pytest.CaptureFixture) -> None:
    plain(verbose=1, scoring={"rare": "roc_auc"}, max_epochs=1).fit(*TRAIN, validation=HELD_OUT)
    line = capsys.readouterr().out
    assert "  scores rare 0." in line and line.endswith(" s\n")


def test_the_score_of_a_task_is_the_metric_that_it_names() -> None:
    rows, targets = TRAIN
    learned = plain(scoring={"rare": "roc_auc", "sum": "neg_mean_absolute_error"}).fit(*TRAIN)
    positive, predicted = targets["rare"] == "yes", learned.predict(rows)
    weight = np.arange(len(rows)) % 3
    probability = learned.predict_proba(rows)["rare"][:, 1]
    for weights in (None, weight):
        expected = {
            "rare": roc_auc_score(positive, probability, sample_weight=weights),
            "sum": -mean_absolute_error(targets["sum"], predicted["sum"], sample_weight=weights),
        }
        assert learned.scores(rows, targets, weights) == pytest.approx(expected)
        assert learned.score(rows, targets, weights) == pytest.approx(
            np.mean(list(expected.values()))
        )
    learned.set_params(scoring={"rare": "f1"})  # of the last class
    assert learned.scores(rows, {"rare": targets["rare"]})["rare"] == pytest.approx(
        f1_score(positive, predicted["rare"] == "yes")
    )
    with pytest.raises(ValueError, match="task 'rare': class 'new' was in no target when"):
        learned.scores(rows, {"rare": np.where(positive, "new", "no")})


def test_one_bad_regression_does_not_decide_the_mean_score() -> None:
    rows, targets = TRAIN
    learned = plain().fit(*TRAIN)
    shifted = {**targets, "sum": targets["sum"] + 1e6}
    scores = learned.scores(rows, shifted)
    assert scores["sum"] < -1e6
    assert learned.score(rows, shifted) == pytest.approx((scores["rare"] - 1) / 2)


@pytest.mark.slow
def test_a_search_can_maximize_the_auc() -> None:
    learned = plain(scoring={"rare": "roc_auc"}, max_epochs=20)
    search = GridSearchCV(learned, {"learning_rate": [1e-7, 0.05]}, cv=2)
    search.fit(X, pd.DataFrame({"rare": Y["rare"]}))
    assert search.best_params_ == {"learning_rate": 0.05} and search.best_score_ > 0.8


def test_an_integer_weight_is_a_repeated_row_where_a_batch_has_all_rows() -> None:
    weight = np.arange(200) % 4
    targets = {
        "rare": Y["rare"],
        "sum": np.where(np.arange(200) % 5 == 0, np.nan, Y["sum"]),
        "visits": np.round(np.exp(X[:, 1])),
    }
    again = np.repeat(np.arange(200), weight)
    settings = {"batch_size": 1000, "max_epochs": 20, "kinds": {"visits": "count"}}
    held_out = (X, targets, weight)
    repeated = (X[again], {name: each[again] for name, each in targets.items()})
    first = plain(**settings).fit(X, targets, weight, validation=held_out)
    second = plain(**settings).fit(*repeated, validation=repeated)
    for one, other in zip(first.history_, second.history_, strict=True):
        for split in ("train", "validation", "scores"):
            assert one[split] == pytest.approx(other[split], rel=1e-3)
    for name in ("sum", "visits"):
        np.testing.assert_allclose(
            first.predict(X)[name], second.predict(X)[name], rtol=1e-3, atol=1e-3
        )
    assert first.scores(*held_out) == pytest.approx(second.scores(*repeated), rel=1e-4)
    unweighted = plain(**settings).fit(X, targets, validation=(X, targets))
    assert np.abs(first.predict(X)["sum"] - unweighted.predict(X)["sum"]).max() > 0.1


def test_a_row_of_weight_0_is_left_out() -> None:
    weight = np.where(np.arange(200) < 80, 0, 2.0)
    left_out, alone = plain().fit(X, Y, weight), plain().fit(*TRAIN, np.full(120, 2.0))
    np.testing.assert_array_equal(left_out.predict(X)["sum"], alone.predict(X)["sum"])
    for wrong, message in (
        (np.zeros(200), "all weights are 0|at least one non-zero"),
        (np.ones(3), "sample_weight.shape == .3,., expected .200,."),
        (-np.ones(200), "Negative values in data passed to `sample_weight`"),
    ):
        with pytest.raises(ValueError, match=message):
            plain().fit(X, Y, wrong)


def test_equal_weights_are_no_weights() -> None:
    none, equal = plain().fit(*TRAIN), plain().fit(*TRAIN, np.full(120, 0.25))
    np.testing.assert_allclose(none.predict(X)["sum"], equal.predict(X)["sum"], rtol=1e-4)
    for weight in (1e-60, 1e60):  # float32 has neither
        same = plain().fit(*TRAIN, np.full(120, weight))
        np.testing.assert_allclose(same.predict(X)["sum"], equal.predict(X)["sum"], rtol=1e-6)


def test_a_task_whose_classes_all_weigh_nothing_is_refused() -> None:
    with pytest.raises(ValueError, match="task 'rare': no training row has a target that counts"):
        plain(class_weight={"rare": {"yes": 0, "no": 0}}).fit(*TRAIN)


class Word(str):
    """A class that counts how often it is looked up."""

    looked_up = 0

    def __hash__(self) -> int:
        Word.looked_up += 1
        return super().__hash__()


def test_validation_targets_are_encoded_once_and_not_after_each_epoch() -> None:
    rows, targets = HELD_OUT
    words = np.array([Word(each) for each in targets["rare"]], object)
    seen: list[int] = []
    learned = plain(scoring={"rare": "f1"}, monitor=("rare", "roc_auc"))
    held_out = (rows, {**targets, "rare": words})
    learned.fit(*TRAIN, validation=held_out, callbacks=[lambda _: seen.append(Word.looked_up)])
    assert 0 < seen[0] == seen[-1] and len(seen) == 3


@pytest.mark.parametrize("given", ["balanced", {"rare": {"yes": 5}}])
def test_class_weights_are_those_of_the_rows_in_the_loss(given: Any) -> None:
    """With a learning rate of almost 0, the loss of the epoch is that of the model after it."""
    rows, targets = TRAIN
    learned = plain(class_weight=given, learning_rate=1e-9, max_epochs=1)
    learned.fit(*TRAIN, validation=HELD_OUT)
    for split, (X, y) in (("train", TRAIN), ("validation", HELD_OUT)):
        probabilities = learned.predict_proba(X)["rare"]
        balanced = dict(zip(*np.unique(targets["rare"], return_counts=True), strict=True))
        weights = {name: 60 / count for name, count in balanced.items()}
        if given == {"rare": {"yes": 5}}:
            weights = {"no": 1, "yes": 5}
        else:
            expected = compute_sample_weight("balanced", targets["rare"])
            np.testing.assert_allclose([weights[each] for each in targets["rare"]], expected)
        of_rows = [weights[each] for each in y["rare"]]
        expected = log_loss(y["rare"], probabilities, sample_weight=of_rows)
        assert learned.history_[0][split]["rare"] == pytest.approx(expected, rel=1e-4)


def tiny(dropout: float = 0.0) -> tuple[nnx.GraphDef, nnx.State, Data]:
    rngs = nnx.Rngs(0)
    layers: list[nnx.Module] = [nnx.Linear(4, 3, rngs=rngs)]
    if dropout:
        layers.append(nnx.Dropout(dropout, rngs=rngs))
    towers = {"sum": nnx.Linear(3, 1, rngs=rngs)}
    model = MultiTask(SharedBottom(nnx.Sequential(*layers), 1), towers)
    scaled = (Y["sum"] - Y["sum"].mean()) / Y["sum"].std()
    every = jnp.ones(200, bool)
    data = Data(jnp.asarray(X, jnp.float32), (jnp.asarray(scaled, jnp.float32),), (every,))
    return (*nnx.split(model, graph=True), data)


def test_the_schedule_and_the_average_are_those_of_a_plain_loop() -> None:
    graph, params, data = tiny()
    trainer = Trainer(graph, (Regression.loss,), Weighting(), adamw("cosine"))
    order = np.arange(200).reshape(5, 40)
    state = with_numbers(trainer.init(params, ema_decay=0.7), 0.05, 0.1, 5)
    state, _ = jax.jit(trainer.epoch)(state, data, jnp.asarray(order))

    def loss(params: nnx.State, rows: np.ndarray) -> jax.Array:
        outputs = nnx.merge(graph, params)(data.inputs[rows])["sum"]
        return jnp.square(outputs[:, 0] - data.targets[0][rows]).mean()

    kernels = jax.tree.map_with_path(lambda path, x: "kernel" in str(path), params)
    optimizer = optax.adamw(optax.cosine_decay_schedule(0.05, 5), weight_decay=0.1, mask=kernels)
    moments, mean, total = optimizer.init(params), jax.tree.map(np.zeros_like, params), 0.0
    for rows in order:
        updates, moments = optimizer.update(jax.grad(loss)(params, rows), moments, params)
        params = optax.apply_updates(params, updates)
        mean = jax.tree.map(lambda m, x: 0.7 * m + 0.3 * np.asarray(x, np.float64), mean, params)
        total = 0.7 * total + 0.3
    for found, expected in ((state.params, params), (state.evaluated, mean)):
        scale = 1.0 if found is state.params else total
        for a, b in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
            np.testing.assert_allclose(a, b / scale, rtol=1e-4, atol=1e-6)


@pytest.mark.slow
def test_a_decaying_rate_and_an_average_are_what_a_fit_keeps() -> None:
    constant, linear, average = (
        plain(max_epochs=4, learning_rate=0.05, **settings).fit(*TRAIN, validation=HELD_OUT)
        for settings in ({}, {"schedule": "linear"}, {"ema_decay": 0.999})
    )
    moves = [
        np.abs(np.diff([row["train"]["sum"] for row in each.history_]))
        for each in (constant, linear)
    ]
    assert moves[1][0] > 0 and constant.n_epochs_ == 4
    found = [each.history_[-1] for each in (constant, linear, average)]
    assert found[0]["train"] == found[2]["train"] != found[1]["train"]
    assert found[0]["validation"]["sum"] < found[2]["validation"]["sum"]  # the mean lies behind


def test_dropout_acts_in_training_alone() -> None:
    dropped = plain(dropout=0.5).fit(*TRAIN, validation=HELD_OUT)
    kept = plain().fit(*TRAIN, validation=HELD_OUT)
    assert dropped.n_parameters_ == kept.n_parameters_
    assert dropped.history_[0]["train"] != kept.history_[0]["train"]
    rows, targets = HELD_OUT
    np.testing.assert_array_equal(dropped.predict(rows)["sum"], dropped.predict(rows)["sum"])
    error = dropped.predict(rows)["sum"] - targets["sum"]
    expected = np.mean((error / dropped.tasks_["sum"].std) ** 2)
    best = dropped.history_[dropped.n_epochs_ - 1]["validation"]["sum"]
    assert best == pytest.approx(expected, rel=1e-4)
    assert not jax.tree.leaves(nnx.state(dropped.model_, nnx.RngState, graph=True))
    again = plain(dropout=0.5).fit(*TRAIN, validation=HELD_OUT)
    np.testing.assert_array_equal(again.predict(rows)["sum"], dropped.predict(rows)["sum"])


@pytest.mark.slow
def test_each_step_drops_other_features() -> None:
    graph, params, data = tiny(dropout=0.5)
    trainer = Trainer(graph, (Regression.loss,), Weighting(), optax.sgd(0.0))
    epochs = trainer.epochs(trainer.init(params), data, None, np.random.default_rng(0), 200)
    losses = {float(epoch.train.tasks[0]) for epoch in itertools.islice(epochs, 4)}
    assert len(losses) == 4


@pytest.mark.slow
@pytest.mark.parametrize("architecture", ["mmoe", "cross_stitch", "ple"])
def test_experts_of_every_architecture_may_drop(architecture: str) -> None:
    def own(width: int, *, rngs: nnx.Rngs) -> nnx.Module:
        return nnx.Sequential(nnx.Linear(width, 8, rngs=rngs), nnx.Dropout(0.9, rngs=rngs))

    expert = {"expert": own} if architecture == "mmoe" else {"dropout": 0.9}
    learned, without = (
        plain(**settings, n_experts=2, n_task_experts=1, expert_units=(8,), max_epochs=2)
        .set_params(architecture=architecture, weighting="gradnorm")
        .fit(*TRAIN)
        for settings in (expert, {})
    )
    assert learned.history_[0]["train"]["sum"] > without.history_[0]["train"]["sum"]
    np.testing.assert_array_equal(learned.predict(X)["sum"], learned.predict(X)["sum"])
    assert not jax.tree.leaves(nnx.state(learned.model_, nnx.RngState, graph=True))


def test_models_of_equal_structure_share_their_programs(caplog: pytest.LogCaptureFixture) -> None:
    """Rates, decays and weights are numbers of a program, whatever gates there are."""

    def fit(**settings: Any) -> None:
        MultiTaskEstimator(
            gate="dselect_k", n_experts=2, expert_units=(3,), batch_size=64, max_epochs=2, k=1
        ).set_params(**settings).fit(*TRAIN, validation=HELD_OUT)

    fit(ema_decay=0.9, random_state=0)
    before = compiled.cache_info()
    with jax.log_compiles(), caplog.at_level(logging.WARNING):
        fit(
            learning_rate=0.02,
            weight_decay=0.1,
            ema_decay=0.99,
            task_weights={"sum": 3.0},
            random_state=1,
            patience=1,
            max_epochs=3,
        )
    assert compiled.cache_info().misses == before.misses
    assert not [text for text in caplog.messages if "Compiling" in text]
    assert before.maxsize == PROGRAMS
