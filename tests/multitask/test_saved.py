"""Fitted estimators in files."""

import copy
import datetime
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
from flax import nnx
from safetensors.numpy import load_file, save_file

from vmoe.errors import Failure
from vmoe.multitask import MultiTaskClassifier, MultiTaskEstimator, saved

RANDOM = np.random.default_rng(0)
DAYS = [datetime.datetime(2020, 1, day) for day in (1, 2, 3)]
FRAME = pd.DataFrame(
    {
        "age": RANDOM.normal(size=60),
        "work": pd.Series(["a", "b", None] * 20),
        "day": pd.Series(DAYS * 20),
        "user": np.arange(60) % 7,
        "tags": [["x"], ["x", "y"], []] * 20,
    }
)
TARGETS = {
    "sum": FRAME["age"].to_numpy() * 3,
    "work": np.array(["no", "yes", "maybe"] * 20),
    "day": np.array(["2020-01-01", "2021-01-01"] * 30, "datetime64[D]"),
    "visits": RANDOM.poisson(2, 60),
}
SETTINGS: dict[str, Any] = {
    "kinds": {"visits": "count"},
    "categorical": ["work", "day", "user", "tags"],
    "hash_buckets": {"user": 5},
    "embedding_size": {"day": 2},
    "expert_units": (4,),
    "tower_units": (),
    "n_experts": 2,
    "max_epochs": 1,
    "validation_fraction": 0,
    "random_state": 0,
}


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
@pytest.mark.parametrize("architecture", ["mmoe", "one_gate", "cross_stitch", "ple"])
def test_every_architecture_is_saved(architecture: str, tmp_path: Path) -> None:
    fitted = MultiTaskEstimator(architecture, **SETTINGS, gate="dselect_k").fit(FRAME, TARGETS)
    fitted.save(tmp_path / "model")
    found = MultiTaskEstimator.load(tmp_path / "model").predict(FRAME)["sum"]
    np.testing.assert_array_equal(found, fitted.predict(FRAME)["sum"])


def test_a_class_loads_its_own_models(file: Path) -> None:
    with pytest.raises(ValueError, match="class is 'MultiTaskEstimator', not MultiTaskClassifier"):
        MultiTaskClassifier.load(file)


def with_content(file: Path, change: Any) -> Path:
    """The file with another JSON text and its SHA-256."""
    arrays = load_file(file)
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


@pytest.mark.parametrize(
    "change",
    [
        lambda content: content.pop("tasks"),
        lambda content: content["settings"].update(expert_units=[3]),
        lambda content: content["settings"].update(n_experts="many"),
        lambda content: content["settings"].update(gone=1),
        lambda content: content["settings"].update(expert={"code": ["print()"]}),
        lambda content: content["encoder"].update(columns=3),
        lambda content: content.update({"class": "Popen"}),
    ],
)
def test_a_file_with_another_content_gets_one_line(change: Any, file: Path) -> None:
    with pytest.raises(ValueError, match="changed: it cannot be used") as error:
        MultiTaskEstimator.load(with_content(file, change))
    assert "\n" not in str(error.value)


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
    changed = copy.copy(fitted).set_params(expert_units=(5,))
    with pytest.raises(ValueError, match="the settings were changed after fit: fit again"):
        changed.save(path)
    with pytest.raises(Failure, match="cannot be written .No such file or directory"):
        fitted.save(tmp_path / "gone" / "model")
    assert path.read_text() == "before" and list(tmp_path.iterdir()) == [path]
