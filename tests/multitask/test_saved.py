"""Fitted estimators in files."""

import copy
import datetime
import functools
import itertools
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import sklearn
from flax import nnx
from safetensors.numpy import load_file, save_file

from vmoe.errors import Failure
from vmoe.multitask import MultiTaskClassifier, MultiTaskEstimator, as_json, saved, settings
from vmoe.multitask.build import CHAINS
from vmoe.multitask.columns import TableEncoder
from vmoe.multitask.tasks import Classification
from vmoe.multitask.values import as_values

RANDOM = np.random.default_rng(0)
DAYS = [datetime.datetime(2020, 1, day) for day in (1, 2, 3)]
FRAME = pd.DataFrame(
    {
        "age": RANDOM.normal(size=60),
        "work": pd.Series(["a", "b", None] * 20),
        "day": pd.Series(DAYS * 20),
        "user": np.arange(60) % 7,
        "tags": [["x"], ["x", "y"], []] * 20,
        "at": pd.Series(DAYS * 20).dt.tz_localize("Europe/Oslo"),
    }
)
TARGETS = {
    "sum": FRAME["age"].to_numpy() * 3,
    "work": np.array(["no", "yes", "maybe"] * 20),
    "day": np.array(["2020-01-01", "2021-01-01"] * 30, "datetime64[D]"),
    "at": FRAME["at"],
    "visits": RANDOM.poisson(2, 60),
}
SETTINGS: dict[str, Any] = {
    "kinds": {"visits": "count"},
    "categorical": ["work", "day", "user", "tags", "at"],
    "hash_buckets": {"user": 5},
    "embedding_size": {"day": 2},
    "expert_units": (4,),
    "tower_units": (),
    "n_experts": 2,
    "max_epochs": 1,
    "validation_fraction": 0,
    "random_state": 0,
}


class Own(MultiTaskEstimator):
    """A class of a user."""


class Fewer(MultiTaskEstimator):
    """A class of a user with one setting."""

    def __init__(self, n_experts: int = 2):
        super().__init__("shared_bottom", **SETTINGS | {"n_experts": n_experts})


@pytest.fixture(scope="module")
def fitted() -> MultiTaskEstimator:
    return MultiTaskEstimator("shared_bottom", **SETTINGS).fit(FRAME, TARGETS)


@pytest.fixture(scope="module")
def file(fitted: MultiTaskEstimator, tmp_path_factory: pytest.TempPathFactory) -> Path:
    fitted.save(path := tmp_path_factory.mktemp("saved") / "model.safetensors")
    return path


def test_a_loaded_model_is_the_saved_one(fitted: MultiTaskEstimator, file: Path) -> None:
    loaded = MultiTaskEstimator.load(file)
    assert type(loaded) is MultiTaskEstimator
    assert loaded.get_params() == fitted.get_params()
    assert loaded.history_ == fitted.history_
    assert loaded.feature_names_in_.tolist() == list(FRAME)
    new = FRAME.assign(work="unknown")
    for frame in (FRAME, new):
        for name, expected in fitted.predict(frame).items():
            found = loaded.predict(frame)[name]
            np.testing.assert_array_equal(found, expected)
            assert found.dtype == expected.dtype
    assert loaded.scores(FRAME, TARGETS) == fitted.scores(FRAME, TARGETS)
    loaded.save(again := file.with_name("again"))
    first, second = load_file(file), load_file(again)
    assert first.keys() == second.keys()
    assert all(np.array_equal(first[name], second[name]) for name in first)


@pytest.mark.process
def test_a_model_predicts_the_same_bits_in_another_process(
    fitted: MultiTaskEstimator, file: Path
) -> None:
    FRAME.to_pickle(rows := file.with_name("rows"))
    code = (
        "import sys, pandas as pd; from vmoe.multitask import MultiTaskEstimator; "
        "found = MultiTaskEstimator.load(sys.argv[1]).predict(pd.read_pickle(sys.argv[2])); "
        "print(found['sum'].tobytes().hex())"
    )
    made = subprocess.run(
        [sys.executable, "-c", code, file, rows], capture_output=True, text=True, check=True
    )
    assert made.stdout.strip() == fitted.predict(FRAME)["sum"].tobytes().hex()


@pytest.mark.slow
@pytest.mark.parametrize("architecture", ["cross_stitch", "ple", "aitm"])
def test_every_kind_of_architecture_is_saved(architecture: str, tmp_path: Path) -> None:
    events = {"work": TARGETS["work"] != "no", "day": TARGETS["work"] == "yes"}
    chain = {"chain": np.array(list(events))} if architecture in CHAINS else {}
    own = SETTINGS | {"kinds": None} | chain
    fitted = MultiTaskEstimator(architecture, **own, gate="dselect_k")
    fitted.fit(FRAME, events).save(tmp_path / "model")
    found = MultiTaskEstimator.load(tmp_path / "model").predict_proba(FRAME)
    for name, expected in fitted.predict_proba(FRAME).items():
        np.testing.assert_array_equal(found[name], expected)


def test_a_class_loads_its_own_models(fitted: MultiTaskEstimator, file: Path) -> None:
    with pytest.raises(ValueError, match="class is 'MultiTaskEstimator', not MultiTaskClassifier"):
        MultiTaskClassifier.load(file)
    own = Own(**fitted.get_params())
    vars(own).update(vars(fitted))
    own.save(path := file.with_name("own"))
    assert type(Own.load(path)) is Own
    with pytest.raises(ValueError, match="class is 'Own', not MultiTaskEstimator or .*: call load"):
        MultiTaskEstimator.load(path)
    own.more_ = 3
    with pytest.raises(ValueError, match="more_: .* has no attributes of your own"):
        own.save(path)


def test_a_class_with_fewer_settings_loads_its_own_models(
    fitted: MultiTaskEstimator, file: Path
) -> None:
    vars(made := Fewer()).update(vars(fitted))
    made.save(path := file.with_name("fewer"))
    made.learning_rate = 0.5
    with pytest.raises(
        ValueError, match="learning_rate=0.5, and in __init__ of Fewer it was 0.001"
    ):
        made.save(path)
    loaded = Fewer.load(path)
    np.testing.assert_array_equal(loaded.predict(FRAME)["sum"], fitted.predict(FRAME)["sum"])
    loaded.expert_units = (5,)
    with pytest.raises(ValueError, match="expert_units=.5,., and in fit it was .4,.: fit again"):
        loaded.save(path)


def test_an_equal_setting_of_another_type_is_no_change(
    fitted: MultiTaskEstimator, file: Path
) -> None:
    for change in (
        {"expert_units": [np.int64(4)], "tower_units": [], "n_experts": np.int64(2)},
        {"expert_units": np.array([4]), "gate_temperature": 1, "embedding_size": {"day": 2.0}},
        {"categorical": pd.Index(SETTINGS["categorical"])},
    ):
        settings.check_settings(copy.copy(fitted).set_params(**change), fitted._fixed)
    many, ends = np.arange(3000), np.arange(3000)
    ends[1500] = 0
    for before, after, text in (
        ({"a": 1, "b": 2}, {"b": 2, "a": 1}, None),
        (many, ends, "another value"),
        ([True, False], [1, 0], "1, 0"),  # a mask, and indices
        (functools.partial(int, 3), functools.partial(int, 3), "int.*was another function"),
    ):
        model = copy.copy(fitted).set_params(categorical=before)
        kept = settings.kept(model, ["categorical"])
        model.set_params(categorical=after)
        if text is None:
            settings.check_settings(model, kept)
        else:
            with pytest.raises(ValueError, match=text):
                settings.check_settings(model, kept)


CHANGES: list[tuple[str, Any]] = [
    ("gate_temperature=2.0, and in fit it was 1.0", {"gate_temperature": 2.0}),
    ("k=1, and in fit it was 2: fit again", {"k": 1}),
    ("gate='dselect_k', and in fit", {"gate": "dselect_k"}),
    ("architecture='one_gate', and in fit it was 'shared_bottom'", {"architecture": "one_gate"}),
    ("chain", {"chain": ["a", "b"]}),
    ("expert_units=.5,., and in fit it was .4,.: fit again", {"expert_units": (5,)}),
    ("categorical=None, and in fit it was", {"categorical": None}),
    ("expert.*function", {"expert": lambda width, rngs: nnx.Linear(width, 4, rngs=rngs)}),
]


def test_a_setting_that_decides_the_model_is_that_of_fit(
    fitted: MultiTaskEstimator, file: Path
) -> None:
    models = [fitted, MultiTaskEstimator.load(file)]
    for (message, change), made in itertools.product(CHANGES, models):
        model = copy.copy(made).set_params(**change)
        with pytest.raises(ValueError, match=message) as error:
            model.save(file.with_name("gone"))
        assert "\n" not in str(error.value) and not file.with_name("gone").exists()
        with pytest.raises(ValueError, match=message):
            model.partial_fit(FRAME, TARGETS)


def test_settings_of_training_and_scores_may_change_before_a_model_is_saved(
    fitted: MultiTaskEstimator, file: Path
) -> None:
    changed = copy.copy(fitted).set_params(learning_rate=0.5, scoring={"work": "neg_log_loss"})
    changed.save(path := file.with_name("changed settings"))
    loaded = MultiTaskEstimator.load(path)
    assert loaded.get_params() == changed.get_params()
    assert loaded.metric_of("work") == "neg_log_loss"


def through_json(values: Any) -> Any:
    return as_json.from_json(json.loads(json.dumps(as_json.to_json("values", values))))


def test_texts_of_any_length_of_numpy_are_saved() -> None:
    texts = np.array(["a", "bc"], np.dtypes.StringDType())
    assert through_json(texts).tolist() == ["a", "bc"]


def test_a_time_that_utc_does_not_have_is_named() -> None:
    zone = datetime.timezone(datetime.timedelta(hours=5))
    with pytest.raises(ValueError, match="days: .*datetime.* is out of the range of UTC: replace"):
        as_values("days", [datetime.datetime.min.replace(tzinfo=zone)])


def test_dates_with_time_zones_and_of_numpy_and_pandas_are_saved() -> None:
    zoned = pd.Series(DAYS).dt.tz_localize("Europe/Oslo")
    # the clock shows 2 to 3 twice, first at +2 hours and then at +1
    twice = pd.date_range("2020-10-24 23:30", periods=3, freq="h", tz="UTC").tz_convert(zoned.dt.tz)
    for days in (
        zoned.tolist(),
        twice.tolist(),
        [day.replace(tzinfo=datetime.UTC) for day in DAYS],
        [pd.Timestamp(day) for day in DAYS],
        [pd.Timestamp(day) - pd.Timestamp(0) for day in DAYS],
        [np.datetime64(day) for day in DAYS],
    ):
        targets = as_values("days", days)
        classes = Classification("days", targets, np.full(3, True)).classes
        np.testing.assert_array_equal(through_json(classes), classes)
        encoder = TableEncoder()
        rows = pd.DataFrame({"day": pd.Series(days, dtype=object)})
        codes = encoder.fit_transform(rows, ["day"]).codes
        again = TableEncoder.from_json(json.loads(json.dumps(encoder.to_json())))
        np.testing.assert_array_equal(again.transform(rows).codes, codes)
        assert sorted(codes[:, 0].tolist()) == [0, 1, 2]


def test_the_metadata_that_a_model_asks_for_are_saved(
    fitted: MultiTaskEstimator, file: Path
) -> None:
    with sklearn.config_context(enable_metadata_routing=True):
        asking = copy.copy(fitted).set_fit_request(sample_weight=True)
    asking.save(path := file.with_name("asking"))
    requests = MultiTaskEstimator.load(path).get_metadata_routing()
    assert str(requests) == str(asking.get_metadata_routing())
    assert requests.fit.requests["sample_weight"] is True


def with_content(file: Path, change: Any, change_arrays: Any = lambda arrays: None) -> Path:
    """The file with another JSON text, other arrays, and their SHA-256."""
    arrays = load_file(file)
    change_arrays(arrays)
    content = json.loads(arrays["json"].tobytes())
    change(content)
    arrays["json"] = np.frombuffer(json.dumps(content).encode(), np.uint8)
    path = file.with_name("changed")
    save_file(
        arrays,
        path,
        {"format": "vmoe.multitask", "version": "1"} | {"sha256": saved.sha256(arrays)},
    )
    return path


def test_what_the_architecture_ignores_may_be_large(file: Path) -> None:
    large = {"n_experts": 2000, "n_task_experts": 2000, "n_layers": 2000, "gate_units": [2000]}
    MultiTaskEstimator.load(with_content(file, lambda content: content["settings"].update(large)))


def classes_of(content: Any, name: str) -> list[Any]:
    """The type and the elements of a task's classes in a file."""
    tasks = [dict(task["dict"]) for kind, task in content["tasks"] if kind == "classification"]
    (found,) = [task["classes"]["array"] for task in tasks if task["name"] == name]
    return found


@pytest.mark.parametrize(
    "change",
    [
        lambda content: content.pop("tasks"),
        lambda content: content.update(y_ndim=2),  # and the tasks have other names
        lambda content: content.update(y_ndim=3),
        lambda content: content["settings"].update(
            architecture="ple", n_experts=1000, n_layers=1000
        ),
        lambda content: content["settings"].update(
            architecture="mmoe", n_experts=900, expert_units=[1] * 900
        ),
        lambda content: content["settings"].update(tower_units=[1] * 900),
        lambda content: content["settings"].update(
            architecture="mmoe", n_experts=2, gate_units=[1] * 900
        ),
        lambda content: classes_of(content, "day")[1].reverse(),
        lambda content: classes_of(content, "day").__setitem__(1, [[0], [366]]),
        lambda content: content.update(findings="ab"),
        lambda content: content.update(n_epochs=0),
        lambda content: content.update(n_epochs=2),
        lambda content: content["history"][0]["dict"].__delitem__(0),
        lambda content: content["settings"].update(expert_units=[3]),
        lambda content: content["settings"].update(n_experts="many"),
        lambda content: content["settings"].update(gone=1),
        lambda content: content["settings"].pop("gate_temperature"),
        lambda content: content["settings"].update(expert={"code": ["print()"]}),
        lambda content: content["settings"].update(architecture="mmoe", n_experts=10**12),
        lambda content: content["settings"].update(
            architecture="mmoe", n_experts=2, gate="dselect_k", k=3
        ),
        lambda content: content["settings"].update(categorical={"array": ["<U500000000", ["a"]]}),
        lambda content: content["settings"].update(categorical={"array": ["V500000000", ["a"]]}),
        lambda content: content["encoder"].update(columns=3),
        lambda content: content["encoder"]["columns"][0].update(mean=float("nan")),
        lambda content: content["encoder"]["columns"][0].update(name=[]),
        lambda content: content["encoder"]["columns"][1].update(vocabulary=-1),
        lambda content: content["encoder"]["vocabularies"][0].update(size=10**12),
        lambda content: content["encoder"]["vocabularies"][2].update(buckets=10**18),
        lambda content: content["encoder"]["vocabularies"][0].update(categories=["b", "a"]),
        lambda content: content["encoder"]["vocabularies"][0].update(categories=["a", 3]),
        lambda content: content["tasks"][0][1]["dict"].append(["predict", 3]),
        lambda content: content["tasks"][0][1]["dict"].pop(),
        lambda content: content["tasks"].append(content["tasks"][0]),
        lambda content: content.update(predict=3),
        lambda content: content.update(history=[3]),
        lambda content: content.update(requests={"fit": {"sample_weight": 3}}),
        lambda content: content.update({"class": "Popen"}),
        lambda content: content.update({"class": []}),
    ],
)
def test_a_file_with_another_content_gets_one_line(change: Any, file: Path) -> None:
    with pytest.raises(ValueError, match="changed: (it cannot be used|k=3: use 1 to 2)") as error:
        MultiTaskEstimator.load(with_content(file, change))
    assert "\n" not in str(error.value)


def test_a_file_names_no_attributes(file: Path) -> None:
    def change(content: Any) -> None:
        content["attributes"] = {"predict": 3, "__class__": 3}

    with pytest.raises(ValueError, match="changed: it cannot be used .*attributes"):
        MultiTaskEstimator.load(with_content(file, change))


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_parameters_that_are_not_finite_are_refused(file: Path, value: float) -> None:
    def change(arrays: dict[str, np.ndarray]) -> None:
        arrays["towers/0/last/bias/value"][0] = value

    with pytest.raises(
        ValueError, match="changed: .*towers/0/last/bias/value has values that are NaN"
    ):
        MultiTaskEstimator.load(with_content(file, lambda content: None, change))


def damage(random: np.random.Generator, content: Any) -> None:
    """Removes, replaces or repeats a random part of a JSON value."""
    parts = [content]
    for part in parts:
        values = part.values() if isinstance(part, dict) else part
        parts += [each for each in values if isinstance(each, dict | list) and each]
    part = parts[random.integers(len(parts))]
    at = list(part)[random.integers(len(part))] if isinstance(part, dict) else -1
    new = (None, True, -1, 0, 10**30, 0.5, float("nan"), "x", [], {}, [["x"]], {"tuple": [1]})
    match random.integers(3):
        case 0:
            part.pop(at)
        case 1:
            part[at] = new[random.integers(len(new))]
        case _ if isinstance(part, dict):
            part["more"] = 1
        case _:
            part.append(part[-1])


@pytest.mark.slow
def test_a_damaged_content_loads_or_gets_one_line(file: Path) -> None:
    random, refused = np.random.default_rng(0), 0
    for _ in range(100):
        path = with_content(file, lambda content: damage(random, content))
        try:
            MultiTaskEstimator.load(path)
        except ValueError as error:
            refused += 1
            assert str(error).startswith(f"{path}: ") and "\n" not in str(error)
    assert refused > 50


def test_a_damaged_file_gets_one_line(file: Path, tmp_path: Path) -> None:
    content, path = file.read_bytes(), tmp_path / "model"
    flipped = bytearray(content)
    flipped[-5] ^= 1
    for given, message in (
        (content[:-1], "model: damaged or no such file"),
        (b"", "model: damaged or no such file"),
        (bytes(flipped), "model: its SHA-256 differs"),
        (content.replace(b'"version":"1"', b'"version":"0"'), "format version '0', this version"),
        (content.replace(b"vmoe.multitask", b"vmoe.nothings."), "no estimator of vmoe.multitask"),
    ):
        path.write_bytes(given)
        with pytest.raises(ValueError, match=message) as error:
            MultiTaskEstimator.load(path)
        assert "\n" not in str(error.value)
    with pytest.raises(ValueError, match="gone: No such file or directory"):
        MultiTaskEstimator.load(tmp_path / "gone")
    with pytest.raises(ValueError, match="Is a directory"):
        MultiTaskEstimator.load(tmp_path)


def test_what_json_cannot_have_is_refused_and_leaves_the_file(
    fitted: MultiTaskEstimator, tmp_path: Path
) -> None:
    path = tmp_path / "model"
    path.write_text("before")
    own = copy.copy(fitted)
    own.set_params(expert=lambda width, rngs: nnx.Linear(width, 4, rngs=rngs))
    with pytest.raises(ValueError, match="expert: <function .* is a function, which cannot be sa"):
        own.save(path)
    with pytest.raises(Failure, match="cannot be written .No such file or directory"):
        fitted.save(tmp_path / "gone" / "model")
    assert path.read_text() == "before" and list(tmp_path.iterdir()) == [path]
