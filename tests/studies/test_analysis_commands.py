"""The real commands ``vmoe routing`` and ``vmoe attack``, on models that come with the package."""

import csv
import json
import math
import re
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from safetensors.numpy import load_file

from tests.command import ROOT, forked, vmoe
from tests.random_models import stored_model, stored_of
from vmoe.checkpoints import read, write
from vmoe.config import MoEConfig, ViTConfig, replace
from vmoe.config.preprocessing import Preprocessing
from vmoe.data.sources import open_source

MODEL = ("routing", "--checkpoint", "vmoe_fashion_mnist", "--data", "fashion_mnist_sample")
FEW = ("--images", "60", "--batch-size", "32")
FIGURES = (
    *("capacity_curves", "experts_by_class", "experts_of_patches", "top_patches"),
    *("k_at_inference", "kept_patches", "random_routers", "weight_histograms"),
)


def test_the_use_of_experts_is_shown_by_block_and_every_decision_exported(tmp_path: Path) -> None:
    """``--check`` exits with 0, as no problem is found; the line has the bounds."""
    file = tmp_path / "routing.safetensors"
    result = vmoe(*MODEL, *FEW, "--export", file, "--check", "--routing.dropless", "True")
    assert result.returncode == 0, result.stderr
    assert f"{file}: 0.2 MB written\n" in result.stderr
    assert (
        "no problem found: no dead expert (below 1% of the mean load), no collapse (an expert "
        "above 5 times the mean load), at most 25% of the choices dropped, gate entropy at least "
        "1% of ln e, at most 1% of the predictions depend on the batch\n"
    ) in result.stdout
    assert "fashion_mnist_sample:test, 60 of 512 images" in result.stdout
    assert "entropy / ln e" in result.stdout and "class (shuffled)" in result.stdout
    assert "predictions that depend on the other images of a batch" in result.stdout
    arrays = load_file(file)
    assert arrays["experts"].shape == (60 * 16, 3, 2) and len({*arrays["indices"]}) == 60
    split = open_source("fashion_mnist_sample", "test")
    labels = [split.labels_of(i)[0] for i in arrays["indices"].tolist()]
    assert arrays["labels"][:, 0].tolist() == labels


@pytest.mark.process
@pytest.mark.parametrize("option", ["--export", "--out"])
def test_on_a_full_disk_the_file_is_named_the_figures_are_printed_and_nothing_is_left(
    option: str, tiny_run: Path, tmp_path: Path
) -> None:
    data = ("--data", "digits", "--images", "128", "--batch-size", "64")
    page = ("--no-removals", "--page-images", "4") if option == "--out" else ()
    arguments = ("routing", "--checkpoint", tiny_run, *data, *page, option, tmp_path / "file.html")
    result = forked(*arguments, max_file_size=10_000)
    assert result.returncode == 1, result.stderr
    assert result.stderr.splitlines()[-1] == f"vmoe: {tmp_path / 'file.html'}: File too large"
    assert "digits:test, 128 of " in result.stdout
    assert not list(tmp_path.iterdir())


@pytest.mark.slow
def test_the_figures_of_a_model_are_written_as_png_files(tmp_path: Path, tiny_run: Path) -> None:
    folder = tmp_path / "plots"
    result = vmoe("routing", "--checkpoint", tiny_run, "--data", "digits", *FEW, "--plots", folder)
    assert result.returncode == 0, result.stderr
    assert f"{folder}: 8 plots drawn in " in result.stderr
    assert {path.name for path in folder.iterdir()} == {f"{name}.png" for name in FIGURES}
    for path in folder.iterdir():
        with Image.open(path) as image:
            assert image.format == "PNG" and min(image.size) > 200
            assert len(np.unique(np.asarray(image.convert("L")))) > 50


@pytest.mark.slow
def test_images_without_labels_have_a_page_and_the_figures_that_need_none(
    tiny_run: Path, tmp_path: Path
) -> None:
    images = open_source("digits", "test").images[:16]
    for i, image in enumerate(images):
        Image.fromarray(image).save(tmp_path / f"{i:02}.png")
    lines = ["path,labels,split", *(f"{i:02}.png,,test" for i in range(len(images)))]
    (tmp_path / "list.csv").write_text("\n".join(lines))
    folder, page = tmp_path / "plots", tmp_path / "page.html"
    data = ("--data", f"manifest:{tmp_path / 'list.csv'}:test", "--no-removals")
    result = vmoe("routing", "--checkpoint", tiny_run, *data, "--plots", folder, "--out", page)
    assert result.returncode == 0, result.stderr
    names = "capacity_curves, experts_by_class, k_at_inference, random_routers"
    assert f"left out, as no image has a known class: {names}\n" in result.stderr
    assert {path.stem for path in folder.iterdir()} == {*FIGURES} - {*names.split(", ")}
    record = page.read_text().partition('id="record">')[2].partition("</script>")[0]
    (shown,) = json.loads(record)["models"]
    assert [block["information"] for block in shown["blocks"]] == [None]
    assert len(re.findall(r" - \W+0\.\d{3} \(0", result.stdout)) == 1  # no class, but positions


@pytest.fixture(scope="module")
def random_model(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A random model for digits with two sparse blocks; no test writes to it."""
    small = dict(patch_size=4, width=16, depth=2, mlp_dim=16, num_heads=2, image_size=8)
    layers = dict(sparse_blocks=(0, 1), moe=MoEConfig(num_experts=4))
    stored = stored_of(ViTConfig(**small, **layers, num_classes=10))
    digits = stored._replace(class_names=tuple("0123456789"))
    return str(write(digits, tmp_path_factory.mktemp("random") / "model", format="vmoe"))


@pytest.mark.slow
def test_a_model_is_compared_with_another_setting_of_its_routing_without_removals(
    random_model: str, tmp_path: Path
) -> None:
    file = tmp_path / "page.html"
    model = ("routing", "--checkpoint", random_model, "--data", "digits")
    compared = ("--compare", random_model, "--routing.capacity-factor", "0.5")
    page = ("--out", file, "--page-images", "10", "--no-removals", "--json")
    result = vmoe(*model, *FEW, *compared, *page)
    assert result.returncode == 0, result.stderr
    tight, own = json.loads(result.stdout)
    assert all(tight["blocks"][i]["dropped"] > own["blocks"][i]["dropped"] for i in "01")
    first, *later = own["compared"].values()  # drops change the inputs of later blocks alone
    assert first["agreement"] == first["same_choices"] == 1
    assert len(later) == 1
    for block in later:
        assert block["agreement_by_chance"] < block["agreement"] < 1 > block["same_choices"]
    record = file.read_text().partition('id="record">')[2].partition("</script>")[0]
    models = json.loads(record)["models"]
    assert len(models) == 2 and not any(model["removed"] for model in models)
    slots = [[block["slots"] for block in model["blocks"]] for model in models]
    assert all(few < many for few, many in zip(*slots, strict=True))
    assert all(few["grid"]["slots"] == sorted(few["grid"]["slots"]) for few in models)


@pytest.mark.slow
def test_a_model_is_not_compared_on_images_of_another_size(
    random_model: str, tmp_path: Path
) -> None:
    stored = read(Path(random_model))
    smaller = stored._replace(preprocessing=Preprocessing(24))
    other = write(smaller, tmp_path / "smaller", format="vmoe")
    model = ("routing", "--checkpoint", random_model, "--data", "digits")
    result = vmoe(*model, *FEW, "--compare", other)
    assert result.returncode == 0, result.stderr
    assert "not compared: the models differ in their sparse blocks or numbers of tokens" in (
        result.stdout
    )


@pytest.mark.slow
def test_a_check_exits_with_3_and_names_every_problem() -> None:
    result = vmoe(*MODEL, *FEW, "--check", "--json", "--routing.capacity-factor", "0.3")
    assert result.returncode == 3
    report = json.loads(result.stdout)
    kinds = ("dropped: block 1: ", "dropped: block 3: ", "dropped: block 5: ", "batch: ")
    messages = (finding["message"] for finding in report["findings"])
    every = "; ".join(kind + message for kind, message in zip(kinds, messages, strict=True))
    assert result.stderr.splitlines()[-1] == f"vmoe: --check: 4 findings: {every}"
    assert list(report["blocks"]) == ["1", "3", "5"]
    assert [finding["kind"] for finding in report["findings"]] == ["dropped"] * 3 + ["batch"]
    for measures in report["blocks"].values():
        assert sum(measures["load"]) == pytest.approx(1) and measures["dropped"] > 0.5
        assert 1 < measures["gate_entropy_nats"] <= math.log(8)
        shares = measures["kept_share"]
        assert (
            shares["class_token"] is None
            and 0 < shares["background"] < 0.6
            and 0 < shares["foreground"] < 0.6
        )
        assert measures["class_information_chance"] < measures["class_information"] < 0.3


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--images", "0"), "images=0: use at least 1 (--images)"),
        (("--export", "gone/a.safetensors"), "export=gone/a.safetensors: no folder gone; make it"),
        (("--plots", "gone/plots"), "plots=gone/plots: no folder gone; make it first (--plots)"),
        (("--plots", str(ROOT / "README.md")), "README.md: it is not a folder; give a folder"),
        (("--checkpoint", "vit_fashion_mnist"), "no block of this model is sparse"),
    ],
)
def test_wrong_arguments_are_one_line(arguments: tuple[str, ...], message: str) -> None:
    result = vmoe(*MODEL, *arguments)
    assert result.returncode == 2 and message in result.stderr
    assert result.stderr.count("\n") == 1


def test_a_model_without_classes_is_refused_where_classes_are_needed_with_a_remedy(
    tmp_path: Path,
) -> None:
    stored = stored_model("vmoe_test_last2_e4", depth=2, sparse_blocks=(1,), num_classes=0)
    path = write(stored, tmp_path / "features", format="vmoe")
    pixel = tmp_path / "pixel.png"
    Image.new("RGB", (1, 1)).save(pixel)
    data = ("--data", "digits")
    for command, *words in (("routing", *data), ("evaluate", *data), ("predict", pixel)):
        result = vmoe(command, "--checkpoint", path, *words)
        message = f"{path}: the model has no classes, only features: fine-tune it with a head"
        assert result.returncode == 2 and result.stderr.startswith(f"vmoe: {message}")


@pytest.mark.slow
def test_a_sparse_model_is_attacked_together_with_a_dense_one(
    tiny_run: Path, tmp_path: Path
) -> None:
    """The dense one is random."""
    dense = replace(read(tiny_run).config, sparse_blocks=())
    stored = stored_of(dense)._replace(class_names=tuple("0123456789"))
    other = write(stored, tmp_path / "dense", format="vmoe")
    models = ("--checkpoint", tiny_run, "--data", "digits", "--compare", other)
    few = ("--images", "64", "--batch-size", "32")
    strength = ("--epsilon", "1", "8", "--steps", "2", "--json")
    result = vmoe("attack", *models, *few, *strength)
    assert result.returncode == 0, result.stderr
    rows = json.loads(result.stdout)
    assert [(row["model"], row["epsilon"]) for row in rows] == [
        (str(model), epsilon) for model in (tiny_run, other) for epsilon in (1.0, 8.0)
    ]
    for weak, strong in (rows[:2], rows[2:]):
        assert weak["accuracy_before"] == strong["accuracy_before"]
        assert weak["loss_after"] < strong["loss_after"]
    assert rows[0]["accuracy_before"] > 0.15
    for when in ("before", "after"):  # the 64 images are independent
        share = rows[0][f"accuracy_{when}"]
        error = np.sqrt(share * (1 - share) / 63)
        assert rows[0][f"standard_error_{when}"] == pytest.approx(error)
    assert list(rows[0]["overlap"]) == ["0"] and not rows[2]["overlap"]
    assert rows[1]["overlap"]["0"] < rows[0]["overlap"]["0"] <= 1


@pytest.fixture(scope="module")
def several_labels(tmp_path_factory: pytest.TempPathFactory) -> str:
    """64 images: of three, the true class is the second of two labels, the only one, or missing."""
    folder = tmp_path_factory.mktemp("several")
    source = open_source("digits", "test")
    lines = ["path,labels,split"]
    for i in range(64):
        Image.fromarray(source.images[i]).save(folder / f"{i:02}.png")
        true, other = (source.class_names[(source.labels[i] + shift) % 10] for shift in (0, 1))
        lines.append(f"{i:02}.png,{(f'{other}|{true}', true, '')[i % 3]},test")
    (folder / "list.csv").write_text("\n".join(lines))
    return f"manifest:{folder / 'list.csv'}:test"


@pytest.mark.process
def test_evaluate_and_attack_count_the_same_images_as_right(
    several_labels: str, tiny_run: Path, tmp_path: Path
) -> None:
    model = ("--checkpoint", tiny_run, "--data", several_labels, "--json")
    file, summary = tmp_path / "predictions.csv", tmp_path / "summary.csv"
    files = ("--predictions", file, "--csv", summary)
    result = vmoe("evaluate", *model, "--batch-size", "64", *files)
    evaluated = json.loads(result.stdout)
    assert f"{file}: 64 rows written\n" in result.stderr
    assert f"{summary}: a row added\n" in result.stderr
    assert 0.1 < evaluated["accuracy"] < 1 and evaluated["unlabeled"] == 21
    with file.open(newline="") as lines:
        rows = list(csv.DictReader(lines))
    assert [Path(row["image"]).name for row in rows] == [f"{i:02}.png" for i in range(64)]
    right = [row["prediction"] in row["labels"].split("|") for row in rows if row["labels"]]
    assert [row["correct"] for row in rows if row["labels"]] == [str(int(x)) for x in right]
    assert np.mean(right) == evaluated["accuracy"] and rows[2]["labels"] == rows[2]["correct"] == ""
    assert all(0.1 <= float(row["probability"]) <= 1 for row in rows)
    with summary.open(newline="") as lines:
        (row,) = csv.DictReader(lines)
    assert (row["images"], row["unlabeled"]) == ("64", "21")
    result = vmoe("attack", *model, "--epsilon", "1", "--steps", "1")
    (row,) = json.loads(result.stdout)
    assert row["accuracy_before"] == evaluated["accuracy"]
    assert (row["images"], row["unlabeled"]) == (43, 21)
    assert "21 of 64 images without a label: they count in no accuracy" in result.stderr


def test_an_attack_along_a_path_needs_routers_that_drop() -> None:
    result = vmoe(
        "attack", *MODEL[1:], "--checkpoint", "vit_fashion_mnist", "--gradient-path", "routers"
    )
    assert result.returncode == 2 and result.stderr.count("\n") == 1
    message = "vit_fashion_mnist: attack.gradient_path=routers: no block of this model is sparse"
    assert message in result.stderr


@pytest.mark.slow
def test_mates_are_attacked_at_every_capacity_and_priority(tiny_run: Path) -> None:
    mates = ("--victims", "2", "--draws", "3", "--capacity-factor", "0.25")
    arguments = (*mates, "--steps", "2", "--images", "16", "--json")
    result = vmoe("mates", "--checkpoint", tiny_run, "--data", "digits", *arguments)
    assert result.returncode == 0, result.stderr
    rows = json.loads(result.stdout)
    assert len(rows) == 4 * 6  # order, largest_gate and two immune settings
    by_place = {(row["capacity_factor"], row["priority"], row["split"]): [] for row in rows}
    for row in rows:
        by_place[row["capacity_factor"], row["priority"], row["split"]].append(row)
    none, mean, worst, *_ = by_place[0.25, "order", False]
    assert none["dropped"] < 0.1 and worst["dropped"] >= mean["dropped"] > 0.5
    for immune in (by_place[None, "order", False], by_place[0.25, "order", True]):
        assert all(row["changed"] == 0 for row in immune)
        assert len({row["dropped"] for row in immune}) == 1


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (
            ("--checkpoint", "vit_fashion_mnist"),
            "vit_fashion_mnist: no block of this model is sparse, so no image depends on its batch",
        ),
        (("--routing.dropless", "True"), "routing.dropless=True: use --capacity-factor and"),
        (("--index", "9"), "mates.index=9: use 0 to 7 (--index)"),
    ],
)
def test_what_does_not_fit_an_attack_by_mates_is_refused(
    arguments: tuple[str, ...], message: str
) -> None:
    result = vmoe("mates", *MODEL[1:], *arguments)
    assert result.returncode == 2 and message in result.stderr
    assert result.stderr.count("\n") == 1
