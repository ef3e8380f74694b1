"""Figures of an evaluation, and predictions of single files."""

import functools

import jax
import numpy as np
import pytest
import scipy.special
from PIL import Image

import vmoe
from vmoe import analysis
from vmoe.axes import Record
from vmoe.data.images import to_float
from vmoe.data.sources import open_source
from vmoe.evaluate import evaluate, predict
from vmoe.nn.vit import ViT

FIELDS = dict(image_size=8, patch=4, depth=2, sparse_blocks=(0, 1), head_std=1.0)


def model(**moe: object) -> ViT:
    return vmoe.create_model("vmoe_tiny_last2_e4", **FIELDS, moe=moe)


def capture(net: ViT, images: np.ndarray) -> tuple[jax.Array, dict[int, Record]]:
    return jax.jit(functools.partial(analysis.capture, net))(images)


def test_figures_are_those_of_numpy_on_all_logits_at_any_batch_size() -> None:
    source, free = open_source("digits", "test"), model(capacity_factor=4.0)
    logits = np.asarray(jax.jit(free.__call__)(to_float(source.images)), np.float64)
    right = logits.argmax(1) == source.labels
    log_probability = scipy.special.log_softmax(logits, axis=1)[np.arange(360), source.labels]
    for batch_size in (100, 256):
        found = evaluate(free, source, batch_size=batch_size)
        assert found.images == 360 and found.dropped == 0
        assert found.accuracy == pytest.approx(right.mean())
        assert found.cross_entropy == pytest.approx(-log_probability.mean(), rel=1e-5)


def test_dropped_is_the_share_of_choices_without_a_slot_in_full_groups() -> None:
    full = model(capacity=1, images_per_group=1)  # 5 tokens, 2 choices each, 4 slots
    found = evaluate(full, open_source("digits", "test"), batch_size=64)
    _, records = capture(full, to_float(open_source("digits", "test").images))
    kept = np.mean([np.asarray(record.routing.kept).mean() for record in records.values()])
    assert found.dropped == pytest.approx(1 - kept) and found.dropped >= 0.6
    assert (found.images_per_group, found.batch_size) == (1, 64)


def test_a_dense_model_has_no_groups_and_drops_nothing() -> None:
    dense = vmoe.create_model("vit_tiny", image_size=8, patch=4, depth=2)
    found = evaluate(dense, open_source("digits", "test"))
    assert (found.images_per_group, found.dropped) == (None, 0)


def test_a_prediction_names_classes_and_the_experts_used(tmp_path) -> None:
    source, net = open_source("digits", "test"), model()
    path = tmp_path / "digit.png"
    Image.fromarray(source.images[3]).save(path)
    (found,) = predict(net, [path], source.class_names, top=3)
    logits, records = capture(net, to_float(source.images[3:4]))
    probabilities = scipy.special.softmax(np.asarray(logits[0], np.float64))
    assert found.classes == [str(i) for i in np.argsort(-probabilities)[:3]]
    np.testing.assert_allclose(found.probabilities, np.sort(probabilities)[::-1][:3], rtol=1e-4)
    for block, shares in found.experts.items():
        routing = records[block].routing
        sent = np.bincount(np.asarray(routing.experts)[np.asarray(routing.kept)], minlength=4)
        np.testing.assert_allclose(shares, sent / sent.sum(), rtol=1e-5)
