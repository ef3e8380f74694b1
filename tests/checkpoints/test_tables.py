"""Fitted models of tables as programs and as ONNX.

The test that converts to ONNX runs where jax2onnx and onnxruntime are installed.
"""

import contextlib
import copy
import datetime
import io
import json
import sys
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pandas as pd
import pytest

from vmoe.checkpoints.export import onnx_file, tables
from vmoe.errors import UsageError
from vmoe.multitask import MultiTaskEstimator
from vmoe.multitask.tasks import Classification

RANDOM = np.random.default_rng(0)
FRAME = pd.DataFrame(
    {
        "age": RANDOM.normal(size=60),
        "pay": RANDOM.normal(size=60) * 1e3,
        "work": pd.Series(["a", "b", None] * 20, dtype=object),
        "place": RANDOM.integers(0, 5, 60),
    }
)
TARGETS = {
    "sum": FRAME["age"].to_numpy() * 3 + 5,
    "job": np.array(["no", "yes", "maybe"] * 20),
    "positive": FRAME["age"].to_numpy() > 0,
    "large": FRAME["age"].to_numpy() > 0.5,
    "visits": RANDOM.poisson(2, 60),
}
CHAIN = ["positive", "large"]


def new_model(architecture: str = "shared_bottom", **settings: Any) -> MultiTaskEstimator:
    own = {"kinds": {"visits": "count"}, "categorical": ["work", "place"], "n_experts": 2}
    own |= {"embedding_size": {"work": 3}, "expert_units": (4,), "max_epochs": 1}
    return MultiTaskEstimator(
        architecture, **{**own, "validation_fraction": 0, "random_state": 0, **settings}
    )


@pytest.fixture(scope="module")
def fitted() -> MultiTaskEstimator:
    return new_model().fit(FRAME, TARGETS)


def outputs_of(model: MultiTaskEstimator, rows: pd.DataFrame) -> dict[str, np.ndarray]:
    """The oracle: probabilities of classifications, predictions of others."""
    return model.predict(rows) | model.predict_proba(rows)


def test_the_program_has_the_outputs_of_the_model_for_any_number_of_rows(
    fitted: MultiTaskEstimator, tmp_path: Path
) -> None:
    tables.write_program(tmp_path / "program", fitted)
    program = jax.export.deserialize((tmp_path / "program" / "model.jaxexport").read_bytes())
    assert program.platforms == ("cpu", "cuda", "tpu")
    about = json.loads((tmp_path / "program" / "encoder.json").read_text())
    assert about["tasks"]["job"] == {"classes": ["maybe", "no", "yes"]}
    for rows in (FRAME, FRAME[:3].assign(work="unknown")):
        table = fitted._encoder.transform(rows)
        found = jax.jit(program.call)(table.numbers, table.codes, table.lists)
        for name, expected in outputs_of(fitted, rows).items():
            np.testing.assert_allclose(found[name], expected, rtol=1e-5, atol=1e-6)


def test_classes_that_are_dates_are_written_as_dates(fitted: MultiTaskEstimator) -> None:
    days = np.array(["2020-01-01", "2021-01-01"], "M8[ns]")
    model = copy.copy(fitted)
    model.tasks_ = {"day": Classification("day", days, np.full(2, True))}
    first = {"datetime": "2020-01-01T00:00:00"}
    assert tables.tasks_of(model)["day"]["classes"][0] == first


def of_all_kinds(random: np.random.Generator, rows: int) -> pd.DataFrame:
    """Random columns of every kind of categories, some of them missing."""
    day = datetime.datetime(2020, 10, 24, 23, 30)
    days = [day + datetime.timedelta(hours=i) for i in range(6)]
    kinds: dict[str, list[Any]] = {
        "text": ["a", "b", "1", "", None, float("nan")],
        "mixed": [
            True,
            False,
            1,
            1.0,
            2.5,
            np.float32(0.1),
            np.int64(7),
            None,
            float("nan"),
            10**20,
        ],
        "date": [*(each.date() for each in days), None],
        "time": [datetime.time(1), datetime.time(2, 30), None],
        "naive": [*days, None, pd.NaT],
        "stamp": [*map(pd.Timestamp, days), None],
        "numpy": [*map(np.datetime64, days), np.datetime64("NaT", "us")],
        "zoned": list(pd.Series(days).dt.tz_localize("UTC").dt.tz_convert("Europe/Oslo")),
        "span": [*(each - day for each in days), pd.Timedelta(3, "h"), None],
        "tags": [["x"], [], None, ["y", None], [None], ["x", "z", "y"]],
        "sizes": [[1, 2.0], [True], [float("nan"), 5.0], [5]],
    }
    columns = {}
    for kind, choices in kinds.items():
        drawn = [choices[i] for i in random.integers(len(choices), size=rows)]
        for name in (kind, f"{kind} hashed"):
            columns[name] = pd.Series(drawn, dtype=object)
    return pd.DataFrame({"age": random.normal(size=rows), **columns})


@pytest.mark.slow
def test_the_page_of_the_program_encodes_rows_as_the_model_does(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    random = np.random.default_rng(0)
    rows, targets = of_all_kinds(random, 60), {"sum": FRAME["age"]}
    coded = [name for name in rows if name != "age"]
    buckets = {name: 50 for name in coded if "hashed" in name}
    fitted = new_model(hash_buckets=buckets, categorical=coded, kinds=None, embedding_size=2)
    tables.write_program(tmp_path, fitted.fit(rows, targets))
    text = (tmp_path / "README.md").read_text().split("```")[1].removeprefix("python\n")
    monkeypatch.chdir(tmp_path)
    names: dict[str, Any] = {}
    with contextlib.redirect_stdout(io.StringIO()) as printed:
        exec(compile(text, "README.md", "exec"), names)
    assert "'sum'" in printed.getvalue()
    new = {**names["rows"][0], "text": "new", "tags": ["new", "x"], "mixed": 3}
    for given in (rows, of_all_kinds(random, 200), pd.DataFrame([new]).astype({"age": float})):
        numbers, codes, lists = names["encode"](given.to_dict("records"))
        table = fitted._encoder.transform(given)
        np.testing.assert_array_equal(numbers, table.numbers)
        np.testing.assert_array_equal(codes, table.codes)
        for found, expected in zip(lists, table.lists, strict=True):
            n = found.shape[1]
            np.testing.assert_array_equal(found, expected[:, :n])
            assert (expected[:, n:] == -1).all()


@pytest.mark.slow
@pytest.mark.parametrize("architecture", ["esmm", "aitm"])
def test_the_program_of_a_chain_has_the_outputs_of_the_model(architecture: str) -> None:
    targets = {name: TARGETS[name] for name in CHAIN}
    fitted = new_model(architecture, chain=CHAIN, kinds=None).fit(FRAME, targets)
    found = jax.jit(tables.export(fitted).call)(*fitted._encoder.transform(FRAME))
    for name, expected in outputs_of(fitted, FRAME).items():
        np.testing.assert_allclose(found[name], expected, rtol=1e-5, atol=1e-6)


@pytest.mark.slow
def test_the_program_takes_lists_of_any_length(tmp_path: Path) -> None:
    rows = FRAME.assign(work=[["a"], ["b", "a"], []] * 20)
    fitted = new_model(hash_buckets={"place": 3}).fit(rows, TARGETS)
    for frame in (rows, rows.assign(work=[["a"] * 5 + ["b"]] * 60)):
        table = fitted._encoder.transform(frame)
        found = jax.jit(tables.export(fitted).call)(*table)
        for name, expected in outputs_of(fitted, frame).items():
            np.testing.assert_allclose(found[name], expected, rtol=1e-5, atol=1e-6)


@pytest.mark.long_after(1)
@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"architecture": "mmoe"},
        {"architecture": "cross_stitch"},
        {"architecture": "ple", "gate": "dselect_k"},
        {"architecture": "esmm", "chain": CHAIN},
        {"architecture": "aitm", "chain": CHAIN},
    ],
    ids=["shared_bottom", "mmoe", "cross_stitch", "ple", "esmm", "aitm"],
)
def test_onnx_takes_the_columns_with_their_strings(settings: Any, tmp_path: Path) -> None:
    for name in ("jax2onnx", "onnx"):
        pytest.importorskip(name)
    onnxruntime = pytest.importorskip("onnxruntime")
    if "chain" in settings:
        settings, targets = {**settings, "kinds": None}, {name: TARGETS[name] for name in CHAIN}
    else:
        targets = TARGETS
    fitted = new_model(**settings).fit(FRAME, targets)
    tables.write_onnx(tmp_path / "model.onnx", fitted)
    session = onnxruntime.InferenceSession((tmp_path / "model.onnx").read_bytes())
    classes = json.loads(session.get_modelmeta().custom_metadata_map["tasks"])
    assert classes["positive"] == {"classes": [False, True]}
    for rows in (FRAME, FRAME[:3].assign(work="unknown", place=99)):
        expected = outputs_of(fitted, rows)
        given = {name: rows[name].to_numpy() for name in rows}
        given["work"] = rows["work"].fillna("").to_numpy(object)
        for name, found in zip(expected, session.run(list(expected), given), strict=True):
            np.testing.assert_allclose(found, expected[name], rtol=1e-4, atol=1e-6)


@pytest.mark.slow
def test_onnx_has_columns_of_any_name(tmp_path: Path) -> None:
    for name in ("jax2onnx", "onnx"):
        pytest.importorskip(name)
    onnxruntime = pytest.importorskip("onnxruntime")
    rows = FRAME.set_axis(["axis", "rows", "inner", "inner network/rows"], axis=1)
    rows = rows.assign(
        **{"output 0": FRAME["pay"], "numbers": FRAME["age"], "matrix 0": ["a", "b"] * 30}
    )
    coded = ["inner", "inner network/rows", "matrix 0"]
    fitted = new_model(categorical=coded, kinds=None, embedding_size=2)
    fitted.fit(rows, {"axis/column": TARGETS["sum"], "var_0": TARGETS["positive"]})
    tables.write_onnx(tmp_path / "model.onnx", fitted)
    session = onnxruntime.InferenceSession((tmp_path / "model.onnx").read_bytes())
    given = {name: rows[name].to_numpy() for name in rows}
    given |= {name: rows[name].fillna("").to_numpy(object) for name in ("inner", "matrix 0")}
    for name, expected in outputs_of(fitted, rows).items():
        (found,) = session.run([name], given)
        np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-6)
    task = fitted.tasks_["var_0"]
    for name, message in (("rows", "'rows' names two columns or tasks"), ("", "'' is the name of")):
        fitted.tasks_ = {name: task}
        with pytest.raises(UsageError, match=message):
            tables.write_onnx(tmp_path / "other.onnx", fitted)


def test_what_onnx_cannot_have_gets_one_line(
    fitted: MultiTaskEstimator, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "jax2onnx", None)
    monkeypatch.setattr(onnx_file.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(UsageError, match="writing ONNX needs jax2onnx: pip install onnx"):
        tables.write_onnx(tmp_path / "model.onnx", fitted)
    vocabulary = fitted._encoder.vocabularies[0]
    for lists, buckets, kind, message in (
        (True, 0, "str", "column 'work': ONNX has no categories of lists: use strings or integers"),
        (False, 9, "str", "ONNX has no categories of a hash"),
        (False, 0, "date", "ONNX has no categories of type date"),
    ):
        other = type(vocabulary)(**{**vars(vocabulary), "buckets": buckets, "type": kind})
        with pytest.raises(UsageError, match=message):
            tables.keys_of("work", other, lists)
