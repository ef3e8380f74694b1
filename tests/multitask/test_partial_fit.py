"""Training by parts of a table."""

import copy
import pickle
import re
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow
import pytest
from pyarrow import parquet

from vmoe.multitask import MultiTaskEstimator, plot_history

RANDOM = np.random.default_rng(0)
AGE = RANDOM.normal(size=400)
USERS = RANDOM.integers(0, 40, 400)
TABLE = pyarrow.table(
    {
        "age": AGE,
        "user": [f"u{user}" for user in USERS],
        "sum": AGE + (USERS % 2) * 3,
        "old": AGE > 0.5,
    }
)
TASKS = ["sum", "old"]


def new_model(**settings: Any) -> MultiTaskEstimator:
    small = {"expert_units": (8,), "tower_units": (), "random_state": 0, "batch_size": 20}
    more = {"hash_buckets": {"user": 500}, "learning_rate": 0.02, **small}
    return MultiTaskEstimator("shared_bottom", **{**more, **settings})


def parts_of(table: Any) -> tuple[Any, Any]:
    return table.drop_columns(TASKS), table.select(TASKS)


def test_batches_of_a_parquet_file_train_as_rows_in_memory_do(tmp_path: Path) -> None:
    parquet.write_table(TABLE, tmp_path / "table.parquet")
    learned = new_model()
    for _ in range(6):
        for batch in parquet.ParquetFile(tmp_path / "table.parquet").iter_batches(100):
            learned.partial_fit(*parts_of(batch))
    assert len(learned.history_) == 24 and learned.n_epochs_ == 24
    scores = learned.scores(*parts_of(TABLE))
    assert scores["sum"] > 0.8 and scores["old"] > 0.9, scores


def test_one_part_of_all_rows_is_an_epoch_of_fit() -> None:
    rows = parts_of(TABLE)
    part = new_model().partial_fit(*rows)
    whole = new_model(max_epochs=1, validation_fraction=0).fit(*rows)
    np.testing.assert_array_equal(part.predict(rows[0])["sum"], whole.predict(rows[0])["sum"])


def test_training_goes_on_after_pickle_fit_and_load(tmp_path: Path) -> None:
    rows = parts_of(TABLE)
    learned = new_model().partial_fit(*rows)
    copied = pickle.loads(pickle.dumps(learned)).partial_fit(*rows)
    learned.save(tmp_path / "model")
    loaded = MultiTaskEstimator.load(tmp_path / "model")
    before = loaded.predict(rows[0])["sum"]
    loaded.partial_fit(*rows)
    learned.partial_fit(*rows)
    np.testing.assert_array_equal(copied.predict(rows[0])["sum"], learned.predict(rows[0])["sum"])
    moved = np.abs(loaded.predict(rows[0])["sum"] - before).max()
    assert moved > 0 and len(loaded.history_) == 2


def test_a_part_has_a_line_and_a_place_in_the_curves_beside_the_epochs_of_fit(
    capsys: pytest.CaptureFixture[str],
) -> None:
    rows = parts_of(TABLE)
    learned = new_model(max_epochs=2, verbose=1).fit(*rows).partial_fit(*rows)
    assert re.search(r"^epoch 3  train .* \d+\.\d s$", capsys.readouterr().out, re.MULTILINE)
    seconds = [row["seconds"] for row in learned.history_]
    assert seconds == sorted(seconds)
    for ax in plot_history(learned):
        train, validation, *_ = ax.lines
        assert len(train.get_ydata()) == 3 and np.isnan(validation.get_ydata()[2])


def test_what_needs_all_rows_is_refused() -> None:
    rows = parts_of(TABLE)
    for settings, message in (
        ({"class_weight": "balanced"}, "class_weight='balanced' needs all rows"),
        ({"class_weight": {"old": "balanced"}}, "class_weight='balanced' needs all rows"),
        ({"class_weight": {"old": np.ones(2)}}, "class_weight: task 'old'"),
        ({"schedule": "cosine"}, "schedule='cosine' needs the number of steps"),
        ({"ema_decay": 1 - 1e-9}, "'ema_decay' parameter"),  # 1 in float32: no average at all
    ):
        with pytest.raises(ValueError, match=message):
            new_model(**settings).partial_fit(*rows)


def test_errors_of_a_part_speak_of_its_rows() -> None:
    table, y = parts_of(TABLE)
    learned = new_model().partial_fit(table, y)
    old = np.array(y["old"])
    for wrong, message in (
        ({"sum": AGE, "old": np.where(old, 2, 0)}, "task 'old': class 2 was in no target when"),
        ({"sum": AGE, "old": np.where(old, "yes", "no")}, "of type str, and the classes are of ty"),
        ({"sum": AGE}, "y of the training rows has the tasks ..sum..: expected ..sum., .old..$"),
        ({"sum": AGE, "old": [None] * 400}, "task 'old': no training row has a target that counts"),
        ({"sum": AGE * 1e300, "old": old}, "'sum': a target is too far from the learned mean"),
    ):
        with pytest.raises(ValueError, match=message) as error:
            learned.partial_fit(table, wrong)
        assert "validation" not in str(error.value) and "fit" not in str(error.value)


@pytest.fixture(scope="module")
def learned() -> MultiTaskEstimator:
    return new_model(ema_decay=0.5).partial_fit(*parts_of(TABLE))


def changed(learned: MultiTaskEstimator, **settings: Any) -> Any:
    """The predictions of a part with other settings."""
    rows = parts_of(TABLE)
    return copy.copy(learned).set_params(**settings).partial_fit(*rows).predict(rows[0])["sum"]


def test_numbers_of_training_may_change_between_two_parts(learned: MultiTaskEstimator) -> None:
    same = changed(learned)
    for settings in (
        {"weight_decay": 1.0},
        {"task_weights": {"old": 100.0}},
        {"ema_decay": 0.99},
        {"ema_decay": None},
    ):
        assert np.abs(changed(learned, **settings) - same).max() > 0.01, settings
    still = changed(learned, learning_rate=1e-12, ema_decay=None)
    averaged = changed(learned, learning_rate=1e-12, ema_decay=1e-7)  # of the last step alone
    np.testing.assert_allclose(averaged, still, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"expert_units": (5,)}, "fit again"),
        ({"weighting": "gradnorm"}, "weighting='gradnorm', and in the last .* was 'fixed': fit"),
        (
            {"dropout": 0.5},
            "dropout=0.5, and in the last partial_fit it was 0.0: fit again, or set",
        ),
    ],
)
def test_another_model_or_program_is_refused_between_two_parts(
    settings: dict[str, Any], message: str, learned: MultiTaskEstimator
) -> None:
    with pytest.raises(ValueError, match=message) as error:
        changed(learned, **settings)
    assert "\n" not in str(error.value)
