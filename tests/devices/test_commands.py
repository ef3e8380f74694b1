"""Commands that use a trained model share it among all devices; the oracle is one device."""

import csv
import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

import vmoe as library
from tests.command import vmoe
from tests.random_models import random_params
from vmoe import models
from vmoe.config import FewShotConfig, MoEConfig, TokenChoice, ViTConfig
from vmoe.data.reading import Reading
from vmoe.data.sources import open_source
from vmoe.evaluate import evaluate, predict
from vmoe.evaluate.fewshot import fewshot, open_fewshot
from vmoe.evaluate.sample import Sample
from vmoe.studies.attack.config import AttackConfig
from vmoe.studies.attack.images import attack, summary
from vmoe.studies.routing.measure import measure_routing

DATA, SHARE = "digits:test", 24  # images on a device, in groups of 8

pytestmark = pytest.mark.process


def saved(folder: Path, **router: object) -> Path:
    """A random model of the digits that drops choices; 8 experts."""
    moe = MoEConfig(num_experts=8, router=TokenChoice(**dict(k=1, capacity_factor=0.5) | router))
    config = ViTConfig(
        image_size=8,
        patch_size=4,
        width=8,
        depth=1,
        mlp_dim=16,
        num_heads=2,
        moe=moe,
        sparse_blocks=(0,),
        num_classes=10,
    )
    model = models.with_params(config, random_params(config))
    library.save(model, folder, class_names=list("0123456789"))
    return folder


def test_an_evaluation_and_predictions_on_eight_devices_are_those_of_one(tmp_path: Path) -> None:
    path = saved(tmp_path / "model")
    loaded = library.load(path)
    source = open_source("digits", "test")
    rows = tmp_path / "rows.csv"
    arguments = ("--checkpoint", path, "--data", DATA, "--batch-size", SHARE, "--json")
    shown = vmoe("evaluate", *map(str, arguments), "--predictions", rows)
    assert shown.returncode == 0, shown.stderr
    ours = json.loads(shown.stdout)
    one = evaluate(loaded.model, source, Reading(SHARE))
    assert ours["devices"] == 8 and ours["batch_size"] == 8 * SHARE
    for name in ("accuracy", "cross_entropy", "dropped", "unprocessed", "images"):
        assert ours[name] == pytest.approx(getattr(one, name), rel=1e-6), name
    assert 0 < ours["dropped"] < 1
    with rows.open() as file:
        correct = [int(row["correct"]) for row in csv.DictReader(file)]
    np.testing.assert_array_equal(correct, one.per_example.correct)

    mesh = vmoe("evaluate", *map(str, arguments), "--mesh", "data=4,expert=2", "--fsdp")
    assert json.loads(mesh.stdout)["accuracy"] == ours["accuracy"], mesh.stderr
    split = library.load(path, mesh="data=4,expert=2", fsdp=True).model
    kernel = split.blocks[0].mlp.experts.up.kernel[...]
    assert {shard.data.shape[0] for shard in kernel.addressable_shards} == {4}  # of 8 experts

    options = ("--data", DATA, "--batch-size", str(SHARE), "--json", "--num-workers", "0")
    options = ("--num-experts", "2", "--k", "1", "--mesh", "expert=8", *options)
    shown = vmoe("prune", path, tmp_path / "two", *options)
    assert shown.returncode == 0, shown.stderr
    assert "the pruned model is on data=4,expert=2: " in shown.stderr, shown.stderr
    pruned = evaluate(library.load(tmp_path / "two").model, source, Reading(SHARE))
    report = json.loads(shown.stdout)
    assert report["before"]["accuracy"] == one.accuracy
    assert report["after"]["accuracy"] == pruned.accuracy

    files = []
    for i in range(3):
        files.append(tmp_path / f"{i}.png")
        Image.fromarray(source[i].image).save(files[-1])
    shown = vmoe("predict", "--checkpoint", path, *files, "--json")
    assert shown.returncode == 0, shown.stderr
    for own, expected in zip(json.loads(shown.stdout), predict(loaded, files), strict=True):
        assert own["classes"] == expected.classes
        np.testing.assert_allclose(own["probabilities"], expected.probabilities, rtol=1e-5)
        np.testing.assert_allclose(own["experts"]["0"], expected.experts[0], rtol=1e-5)


def test_a_model_without_a_capacity_is_evaluated_on_all_devices_and_attacked_by_mates_on_one(
    tmp_path: Path,
) -> None:
    path = saved(tmp_path / "model", dropless=True)
    shown = vmoe("evaluate", "--checkpoint", path, "--data", DATA, "--json", "--batch-size", "24")
    ours = json.loads(shown.stdout)
    one = evaluate(library.load(path).model, open_source("digits", "test"), Reading(SHARE))
    assert ours["devices"] == 8 and ours["dropped"] == 0
    assert ours["cross_entropy"] == pytest.approx(one.cross_entropy, rel=1e-6)
    few = ("--images", "16", "--batch-size", "8", "--victims", "1", "--draws", "1", "--steps", "1")
    shown = vmoe("mates", "--checkpoint", path, "--data", DATA, *few, "--capacity-factor", "0.5")
    assert shown.stderr.startswith("1 of 8 devices is used: groups with a victim")
    assert shown.returncode == 0, shown.stderr


@pytest.mark.slow
def test_studies_on_eight_devices_give_what_one_gives(tmp_path: Path) -> None:
    path = saved(tmp_path / "model")
    loaded = library.load(path)
    model = ("--checkpoint", path, "--data", DATA)
    few = ("--images", "50", "--batch-size", "8")

    shown = vmoe("attack", *model, *few, "--epsilon", "8", "--steps", "2", "--json")
    assert shown.returncode == 0, shown.stderr
    sample = Sample(DATA, loaded, images=50, batch_size=8)
    results, labels = [], []
    for batch in sample.batches():
        how = AttackConfig(8.0, steps=2)
        results.append(attack(loaded.model, *batch[:2], how, valid=batch.valid))
        labels.append(batch.labels[batch.valid])
    (row,), one = json.loads(shown.stdout), summary(results, np.concatenate(labels))
    assert one["loss_after"] > results[0].losses_before.mean()
    assert row["overlap"] == pytest.approx(one.pop("overlap"), rel=1e-4)
    assert {k: row[k] for k in one} == pytest.approx(one, rel=1e-4)
    shown = vmoe("attack", *model, *few, "--auxiliary-loss", "--steps", "2", "--epsilon", "8")
    assert shown.stderr.startswith("1 of 8 devices is used: ") and shown.returncode == 0

    shown = vmoe("routing", *model, *few, "--json", "--out", tmp_path / "page.html")
    assert shown.returncode == 0, shown.stderr
    measured = measure_routing(loaded, DATA, sample.batches, sample.batches(), batch_size=8)
    own = json.loads(shown.stdout)["blocks"]["0"]
    assert own["dropped"] == pytest.approx(float(measured.blocks[0].dropped), rel=1e-6)
    assert own["load"] == pytest.approx(list(measured.blocks[0].load), rel=1e-5)

    shown = vmoe(
        "probe", *model[:2], "--data", "digits", "--shots", "2", "--batch-size", SHARE, "--json"
    )
    assert shown.returncode == 0, shown.stderr
    config = FewShotConfig(data=("digits",), shots=(2,), batch_size=SHARE)
    probed = fewshot(loaded.model, open_fewshot(config), config, loaded.preprocessing)
    assert json.loads(shown.stdout)["accuracy"]["digits"] == pytest.approx(
        probed.accuracy["digits"]
    )
