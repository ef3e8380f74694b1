"""``vmoe advise``: measures of drawn images, and what is said of images like and unlike others."""

import json
import shlex
from pathlib import Path

import jax.numpy as jnp
import numpy as np
import pytest
from PIL import Image

import vmoe
from scripts.experiments.framework.runs import read_rows
from scripts.experiments.solar import data
from scripts.experiments.solar.arms import COPIES
from scripts.maintain import advice as maintained
from tests.command import vmoe as command_of
from tests.random_models import stored_of
from tests.scripts.test_solar import row_of
from vmoe import models
from vmoe.checkpoints import write
from vmoe.config import replace
from vmoe.costs.flops import cost
from vmoe.passes import in_batches
from vmoe.studies.advise.advice import STORED, Contrast, Reference, advise, read_reference
from vmoe.studies.advise.advice import table as table_of
from vmoe.studies.advise.measures import Measures, measure, measure_patches, routed_share

CONFIG = models.model_config("vit_test", depth=3)
CELLS, DRAWINGS = Measures(0.0, 3.0, 0.05), Measures(0.1, 2.0, 0.05)
CLOTHES = Measures(0.3, 2.5, 0.05)


@pytest.fixture(scope="module")
def dense(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small random model."""
    return write(stored_of(CONFIG), tmp_path_factory.mktemp("advise") / "a dense", format="vmoe")


@pytest.fixture
def photos(tmp_path: Path) -> Path:
    """24 images of two classes, dark and light, of which 80% train."""
    random = np.random.default_rng(0)
    for i in range(24):
        path = tmp_path / "photos" / ("dark", "light")[i % 2] / f"{i}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        pixels = random.integers(0, 60, (32, 32, 3)) + 190 * (i % 2)
        Image.fromarray(pixels.astype(np.uint8)).save(path)
    return tmp_path / "photos"


def reference_of(path: Path, **changes: object) -> Reference:
    """A complete table: cells at two numbers of images, drawings at one, clothes not yet."""
    found = {
        "cells": [(40, 0.5, 1, -2, 3, 0.7, 5), (1000, 2, 0.5, 0.6, 3.4, 0.01, 5)],
        "drawings": [(1000, -2, 0.5, -3.4, -0.6, 0.02, 5)],
        "clothes": [],
    }
    shown = {"cells": CELLS, "drawings": DRAWINGS, "clothes": CLOTHES}
    data_sets = [
        dict(
            name=name,
            images=1800,
            measures=shown[name]._asdict(),
            contrasts=[dict(zip(Contrast._fields, each, strict=True)) for each in contrasts],
        )
        for name, contrasts in found.items()
    ]
    path.write_text(json.dumps(dict(date="2026-12-01", model="a", data_sets=data_sets) | changes))
    return read_reference(path)


def test_clusters_tell_classes_that_look_different_as_on_tokens_of_the_experiment(
    tmp_path: Path,
) -> None:
    stored = stored_of(replace(CONFIG, patch_size=2, num_heads=1, depth=1))
    model, rng = stored.model(), np.random.default_rng(0)
    labels = rng.integers(2, size=(20, 1))
    pixels = 200 * labels[..., None, None] + rng.integers(0, 50, (20, 32, 32, 3))
    kept = write(stored, tmp_path / "dense", format="vmoe")
    loaded = vmoe.load(kept)
    images = np.asarray(loaded.preprocess([*pixels.astype(np.uint8)]))
    found = measure(model, in_batches(images, labels, batch_size=16))
    assert found.groups > 0.4 and 1 <= found.spread <= 4
    every = data.Images([*pixels.astype(np.uint8)], labels[:, 0], np.empty(0), np.arange(20))
    tokens = data.tokens(every, loaded, tmp_path / "tokens.npy")
    patches = np.asarray(model.blocks[-1].norm2(jnp.asarray(tokens, jnp.float32)))
    assert patches.shape[1] == 64
    again = measure_patches(model.config, patches, labels)
    np.testing.assert_allclose(again, found, atol=0.01)
    shuffled = measure_patches(model.config, patches, rng.permutation(labels))
    assert abs(shuffled.groups) < 0.15


def test_the_routed_share_is_that_of_the_last_mlp_in_the_flops_of_the_traced_program() -> None:
    gated = replace(CONFIG, mlp="gated")
    whole = cost(gated).flops_per_image
    half = cost(replace(gated, mlp_dim=gated.mlp_dim // 2)).flops_per_image
    of_all_tokens = 2 * (whole - half) / gated.depth / whole
    np.testing.assert_allclose(routed_share(gated), of_all_tokens * 16 / 17)


def test_the_verdict_is_that_of_the_nearest_data_set_at_the_nearest_number_of_images(
    tmp_path: Path,
) -> None:
    table = reference_of(tmp_path / "table.json")
    found = advise(CELLS, 1500, table)
    assert (found.verdict, found.nearest) == ("yes", "cells")
    assert found.reason == (
        "on cells, 1,000 images, experts minus a dense block of equal FLOPs are +2.0 points of "
        "accuracy (95% interval +0.6 to +3.4, corrected p 0.01, 5 folds)"
    )
    assert advise(DRAWINGS, 800, table).verdict == "no"
    columns, rows = table_of(CELLS, 1500, table, found.nearest)
    assert columns == ["", "yours", "cells (nearest)", "drawings", "clothes"]
    assert rows[-1][2:] == ["+2.0 ± 0.5 (1,000)", "-2.0 ± 0.5 (1,000)", ""]
    assert rows[-2][1:] == ["1,500", "40, 1,000", "1,000", "none yet"]
    few = advise(CELLS._replace(groups=0.01), 50, table)
    assert few.verdict == "not known" and few.contrast.images == 40
    assert "-2.0 to +3.0, corrected p 0.7" in few.reason


def test_of_images_or_models_unlike_the_measured_ones_no_evidence_is_told(tmp_path: Path) -> None:
    table = reference_of(tmp_path / "table.json")
    for own, images, why in (
        (CELLS, 15, "15 images to train on (of cells 40, 1,000 were measured)"),
        (CELLS, 300, "300 images to train on (of cells 40, 1,000 were measured)"),
        (DRAWINGS, 2501, "2,501 images to train on (of drawings 1,000 were measured)"),
        (CLOTHES._replace(groups=0.8), 1000, "groups 0.80 (in the experiment 0.00 to 0.30)"),
        (CELLS._replace(spread=4.0), 1000, "spread 4.00 (in the experiment 2.00 to 3.00)"),
        (
            CELLS._replace(routed=0.2),
            1000,
            "share of the FLOPs that is routed 20.0% (in the experiment 5.0%)",
        ),
    ):
        found = advise(own, images, table)
        assert found.verdict == "not known" and found.reason == f"no evidence: {why}"
    assert advise(CELLS._replace(routed=0.021), 1000, table).verdict == "yes"
    assert advise(CELLS._replace(spread=3.3), 1000, table).verdict == "yes"


def test_before_its_rows_are_measured_the_table_says_so_in_a_line(tmp_path: Path) -> None:
    table = reference_of(tmp_path / "table.json")
    found = advise(CLOTHES, 1000, table)
    assert (found.verdict, found.nearest) == ("not known", "clothes")
    assert found.reason.endswith("has no rows of the nearest, clothes, yet")
    empty = reference_of(tmp_path / "table.json", data_sets=[])
    assert "no data set yet" in advise(CLOTHES, 1000, empty).reason
    assert table_of(CLOTHES, 1000, empty, None)[0] == ["", "yours"]


def test_the_packaged_table_is_what_its_script_makes_of_the_stored_rows() -> None:
    stored = json.loads(STORED.read_text())
    numbers = {each["name"]: each["images"] for each in stored["data_sets"]}
    made = maintained.contrasts(read_rows(maintained.STORED_ROWS), numbers)
    assert made == {each["name"]: each["contrasts"] for each in stored["data_sets"]}
    assert {*made} == {*maintained.NAMES.values()}


def test_the_script_takes_tests_of_which_all_folds_are_measured() -> None:
    folds = {"solar_40": range(5), "solar_all": range(5), "clothes_1000": range(4)}
    rows = {}
    for name, own in folds.items():
        rows[f"{name}_dense_active"] = {i: row_of("1" + "01"[i % 2]) for i in own}
        rows |= {f"{name}_{arm}": {i: row_of("11") for i in own} for arm in COPIES}
    found = maintained.contrasts(rows, {"cells": 2624, "clothes": 1800})
    assert [each["images"] for each in found["cells"]] == [40, 1574] and not found["clothes"]
    first = Contrast(**found["cells"][0])
    assert (first.mean, first.folds) == (30, 5) and first.error == pytest.approx(20)
    assert first.high == pytest.approx(30 + 2.776 * 20, abs=0.1)


def test_the_command_names_the_nearest_data_set_and_prints_a_command_that_works(
    dense: Path, photos: Path, tmp_path: Path
) -> None:
    result = command_of("advise", photos, "--checkpoint", dense)
    assert result.returncode == 0, result.stderr
    assert f"folder:{photos}:train: " in result.stdout and " images of 2 classes" in result.stdout
    assert result.stdout.count("(nearest)") == 1
    assert "would experts help? not known: no evidence: " in result.stdout
    *_, law, last = result.stdout.splitlines()
    assert law.startswith("three data sets: no law")
    _, *command = shlex.split(last.removeprefix("to try it: "))
    command[command.index("SPARSE")] = str(tmp_path / "sparse")
    tried = command_of(*command)
    assert "4 experts in blocks (2,)" in tried.stdout, tried.stderr
    refused = command_of("advise", photos, "--checkpoint", tmp_path / "sparse")
    assert refused.returncode == 2
    assert "blocks (2,) have experts already: give a dense model" in refused.stderr
    found = json.loads(
        command_of("advise", f"{photos}:train", "--checkpoint", dense, "--json").stdout
    )
    assert found["verdict"] == "not known" and found["classes"] == 2 and found["images"] <= 24
    assert found["command"][-4:] == ["--blocks", "2", "--num-experts", "4"]
    assert {"groups", "spread", "routed"} == {*found["measures"]}


def test_without_a_model_the_number_of_images_is_compared(photos: Path) -> None:
    result = command_of("advise", photos)
    assert result.returncode == 0, result.stderr
    assert "not known: groups and spread are measured with a dense model only" in result.stdout
    assert f"to know more: vmoe advise {photos} --checkpoint DENSE" in result.stdout
    assert json.loads(command_of("advise", photos, "--json").stdout)["measures"] is None


def test_images_that_cannot_be_advised_on_are_refused_in_a_line(
    dense: Path, photos: Path, tmp_path: Path
) -> None:
    one = tmp_path / "one"
    one.mkdir()
    (photos / "dark").rename(one / "dark")
    for given, problem in (
        (one, "give images of two classes at least, it has 1"),
        (tmp_path / "none", "no data set "),
        (photos / "light", "no sub-folders; put the images of each class into one"),
    ):
        result = command_of("advise", given, "--checkpoint", dense)
        assert result.returncode == 2 and problem in result.stderr, result.stderr
