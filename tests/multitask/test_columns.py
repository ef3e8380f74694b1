"""How columns of a table are encoded, and what a model makes of them."""

import json
from typing import Any

import jax.numpy as jnp
import numpy as np
import pandas as pd
import pyarrow
import pytest
from flax import nnx
from sklearn.feature_extraction import FeatureHasher
from sklearn.preprocessing import OrdinalEncoder

from vmoe.multitask.columns import TableEncoder, TableRows, rows_of

FRAME = pd.DataFrame(
    {
        "age": np.arange(8) / 3,
        "from": ["a", "a", "b", "c", None, "a", "b", "d"],
        "to": ["b", "e", "e", "b", "a", "e", "e", "a"],
        "tags": [["x"], ["y", "x"], [], None, ["x", None], ["z"], ["z", "y", "x"], ["y"]],
    }
)


def test_rare_categories_share_the_code_of_unknown_ones() -> None:
    encoder = TableEncoder(min_frequency=2)
    codes = encoder.fit_transform(FRAME[["age", "from"]]).codes[:, 0]
    oracle = OrdinalEncoder(min_frequency=2, encoded_missing_value=2)  # rare ones come last
    wanted = oracle.fit_transform(FRAME[["from"]])[:, 0]
    np.testing.assert_array_equal(codes, wanted)
    new = encoder.transform(FRAME[["age", "from"]].assign(**{"from": "new"})).codes
    np.testing.assert_array_equal(new, 2)


def test_hashed_categories_need_no_vocabulary() -> None:
    encoder = TableEncoder(hash_buckets={"from": 1000})
    frame = FRAME[["age", "from"]]
    encoder.fit_transform(frame)
    new = frame.assign(**{"from": [f"user {i}" for i in range(8)]})
    codes = encoder.transform(new).codes[:, 0]
    hasher = FeatureHasher(2**31 - 1, input_type="string", alternate_sign=False)
    signed = hasher.transform([[each] for each in new["from"]]).indices  # |hash| as signed
    assert codes.max() < 1000 and len(set(codes.tolist())) == 8
    for code, index in zip(codes.tolist(), signed.tolist(), strict=True):
        assert code in (index % 1000, (2**32 - index) % 1000)
    assert encoder.transform(frame).codes[4, 0] == 1000  # missing
    whole = TableEncoder(hash_buckets={"from": 7})
    ints, floats = (pd.DataFrame({"from": np.arange(8).astype(t)}) for t in (int, float))
    np.testing.assert_array_equal(
        whole.fit_transform(ints, ["from"]).codes, whole.transform(floats).codes
    )
    equal = TableEncoder(hash_buckets={"from": 10**6})
    for values in ([True, 1, 1.0, np.float32(1)], [0.1, np.float64(0.1)], [False, 0, -0.0]):
        one = pd.DataFrame({"from": pd.Series(values, dtype=object)})
        assert len(set(equal.fit_transform(one, ["from"]).codes[:, 0].tolist())) == 1, values


def test_columns_that_share_embeddings_have_equal_codes_for_equal_categories() -> None:
    encoder = TableEncoder(shared_embeddings=[["from", "to"]])
    table = encoder.fit_transform(FRAME)
    categories = ["a", "b", "c", "d", "e"]
    for i, name in enumerate(("from", "to")):
        found = [(categories + [None])[code] for code in table.codes[:, i]]
        assert found == [None if value != value else value for value in FRAME[name]]
    assert len(TableRows(encoder, rngs=nnx.Rngs(0)).vectors[0].embedding[...]) == 6 + 4


def test_columns_have_sizes_of_their_own_and_lists_the_mean_of_their_embeddings() -> None:
    encoder = TableEncoder(embedding_size={"from": 2, "tags": 3, "to": 2})
    table = encoder.fit_transform(FRAME)
    rows = TableRows(encoder, rngs=nnx.Rngs(0))
    of_two = np.array(rows.vectors[0].embedding[...])
    rows.vectors[1].embedding[...] = jnp.arange(12.0).reshape(4, 3)
    made = np.asarray(rows(table))
    assert made.shape == (8, rows.width) == (8, 1 + 2 + 2 + 3)
    for i, row in enumerate(FRAME.itertuples()):
        known = [{"x": 0, "y": 1, "z": 2}[tag] for tag in row.tags or [] if tag] or [3]
        np.testing.assert_allclose(
            made[i],
            np.concatenate(
                [
                    table.numbers[i],
                    of_two[{"a": 0, "b": 1, "c": 2, "d": 3}.get(row[2], 4)],
                    of_two[5 + {"a": 0, "b": 1, "e": 2}[row.to]],
                    np.arange(12.0).reshape(4, 3)[known].mean(0),
                ]
            ),
            rtol=1e-6,
        )
    longer = FRAME.assign(tags=[["x"] * 9 + ["new"]] * 8)
    mean = (9 * np.arange(3.0) + np.arange(9.0, 12.0)) / 10
    np.testing.assert_allclose(rows(encoder.transform(longer))[0, -3:], mean, rtol=1e-6)


@pytest.mark.parametrize("kind", ["frame", "arrow", "array"])
def test_an_encoder_of_json_is_the_same(kind: str) -> None:
    given: Any = {
        "frame": FRAME,
        "arrow": pyarrow.Table.from_pandas(FRAME),
        "array": FRAME.to_numpy(),
    }[kind]
    encoder = TableEncoder(
        embedding_size=np.int64(4), hash_buckets={"to" if kind != "array" else 2: 3}
    )
    table = encoder.fit_transform(rows_of(given), None if kind != "array" else [1, 2, 3])
    again = TableEncoder.from_json(json.loads(json.dumps(encoder.to_json())))
    found = again.transform(rows_of(given))
    reference = encoder if kind != "frame" else TableEncoder(hash_buckets={"to": 3})
    expected = reference.fit_transform(FRAME) if kind == "frame" else table
    for a, b in zip([*found[:2], *found.lists], [*expected[:2], *expected.lists], strict=True):
        np.testing.assert_array_equal(a, b)


WRONG: list[tuple[str, dict[str, Any]]] = [
    ("hash_buckets: 'age' is none of the categorical columns", {"hash_buckets": {"age": 3}}),
    ("hash_buckets: column 'to': 0: use an integer from 1 on", {"hash_buckets": {"to": 0}}),
    ("embedding_size: column 'to': 2.5: use an int", {"embedding_size": {"to": 2.5}}),
    ("shared_embeddings: 'no' is none of", {"shared_embeddings": [["to", "no"]]}),
    ("name each column once", {"shared_embeddings": [["to", "from"], ["to", "tags"]]}),
    (
        r"\['to', 'from'\] differ in embedding_size or hash_buckets",
        {"shared_embeddings": [["to", "from"]], "hash_buckets": {"to": 3}},
    ),
]


@pytest.mark.parametrize(("message", "settings"), WRONG)
def test_wrong_settings_of_columns_get_one_line(message: str, settings: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=message) as error:
        TableEncoder(**settings).fit_transform(FRAME)
    assert "\n" not in str(error.value)


def test_a_row_without_a_list_is_an_empty_one_and_lists_have_a_power_of_two_of_places() -> None:
    encoder = TableEncoder()
    encoder.fit_transform(FRAME)
    none = encoder.transform(FRAME.assign(tags=None)).lists
    empty = encoder.transform(FRAME.assign(tags=[[]] * 8)).lists
    np.testing.assert_array_equal(none, empty)
    places = [
        encoder.transform(FRAME.assign(tags=[["x"] * n] * 8)).lists[0].shape[1] for n in (3, 4, 5)
    ]
    assert places == [4, 4, 8]


def test_lists_and_single_values_are_not_mixed() -> None:
    encoder = TableEncoder()
    encoder.fit_transform(FRAME)
    with pytest.raises(ValueError, match="'tags': single values, and in fit lists: convert them"):
        encoder.transform(FRAME.assign(tags="x"))
    with pytest.raises(ValueError, match="'tags': 'x' is no list, as other values are: give lists"):
        encoder.transform(FRAME.assign(tags=[["x"], "x"] * 4))
