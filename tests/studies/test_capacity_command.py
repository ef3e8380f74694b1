"""``vmoe capacity`` writes routing.json; evaluate, predict and load use it."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

import vmoe as library
from tests.command import vmoe
from tests.random_models import stored_of
from vmoe.checkpoints import write
from vmoe.cli.model import ModelArgs
from vmoe.config import MoEConfig, RoutingOverrides, TokenChoice, ViTConfig, replace
from vmoe.errors import UsageError
from vmoe.models import model_config
from vmoe.surgery import fit

FEW = ("--images", "64", "--batch-size", "32")


@pytest.fixture(scope="module")
def run(tiny_run: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run folder with a routing.json; no test changes it."""
    folder = tmp_path_factory.mktemp("capacity")
    run = folder / "run"
    shutil.copytree(tiny_run, run)
    plot = folder / "plot.png"
    result = vmoe("capacity", "--checkpoint", run, "--budget", "0.95x", *FEW, "--plot", plot)
    assert result.returncode == 0, result.stderr
    assert "digits:validation" in result.stdout and "Accuracy within budgets" in result.stdout
    assert f"chosen for 0.95x: {run / 'routing.json'}" in result.stdout
    assert "uniform: k, capacity factor, priority" in result.stdout
    assert f"{run / 'routing.json'}: routing of 1 block written\n" in result.stderr
    assert f"{plot}: trade-off drawn\n" in result.stderr
    with Image.open(plot) as image:
        assert min(image.size) > 300
    return run


def evaluated(*arguments: str | Path) -> tuple[dict[str, object], str]:
    result = vmoe("evaluate", "--json", *arguments)
    assert result.returncode == 0, result.stderr
    report = json.loads(result.stdout)
    report.pop("images_per_second")
    return report, result.stderr


@pytest.mark.process
def test_evaluate_uses_the_file_and_says_so(run: Path, tiny_run: Path) -> None:
    file = run / "routing.json"
    content = json.loads(file.read_text())
    (setting,) = content["blocks"].values()
    assert content["cost"] <= 0.95 and content["step"] == 60
    report, message = evaluated("--checkpoint", run)
    assert f"routing of {file}: " in message and "chosen on digits:validation" in message
    assert report.pop("routing_file") == str(file)
    options = [(f"--routing.{name.replace('_', '-')}", str(x)) for name, x in setting.items()]
    overridden, message = evaluated("--checkpoint", run, *(x for each in options for x in each))
    assert report == overridden and not message
    given, _ = evaluated("--checkpoint", tiny_run, "--routing-file", file)
    assert given == report | {"routing_file": str(file)}


def test_without_the_file_a_model_is_the_one_that_was_trained(
    run: Path, tiny_run: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    trained, chosen = (
        ModelArgs(checkpoint=run, routing_file=given).load().model.config for given in ("none", "")
    )
    assert trained == library.load(tiny_run).model.config != chosen
    (message,) = capsys.readouterr().err.splitlines()
    assert message.startswith(f"routing of {run / 'routing.json'}: ")


def test_the_file_of_an_older_version_is_used_and_that_is_said(
    run: Path, tiny_run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    content = json.loads((run / "routing.json").read_text())
    content |= {"format": 1, "accuracy_even": content.pop("accuracy_uniform")}
    older = tmp_path / "run"
    shutil.copytree(tiny_run, older)
    (older / "inference.json").write_text(json.dumps(content))
    chosen, newer = (ModelArgs(checkpoint=path).load() for path in (older, run))
    assert chosen.routing_file is not None and newer.routing_file is not None
    assert chosen.routing_file[1] == newer.routing_file[1]
    assert chosen.model.config == newer.model.config
    used, said, _ = capsys.readouterr().err.splitlines()
    file = older / "inference.json"
    assert used.startswith(f"routing of {file}: ")
    assert said == f"{file}: rename it to routing.json, its name in this version of vmoe"


def test_a_file_whose_accuracies_are_of_images_in_another_order_is_used_and_that_is_said(
    run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    content = json.loads((run / "routing.json").read_text())
    del content["order"]  # as an older version wrote it
    file = tmp_path / "older.json"
    file.write_text(json.dumps(content))
    ModelArgs(checkpoint=run, routing_file=str(file)).load()
    used, said = capsys.readouterr().err.splitlines()
    assert used.startswith(f"routing of {file}: ")
    assert said == (
        f"{file}: its accuracies are of images in another order (as stored; now shuffled, seeds 0 "
        "and 1): run vmoe capacity again to measure them"
    )


def test_slots_and_flops_are_those_of_images_of_the_preprocessings_size(tmp_path: Path) -> None:
    small = stored_of(model_config("vmoe_test_last2_e4", image_size=24))
    small = small._replace(class_names=tuple("0123456789"))
    config = replace(small.config, image_size=32)
    larger, _ = fit(small.config, small.params, config)
    reports = []
    for name, model in (("of 24", small), ("of 32", small._replace(config=config, params=larger))):
        path = write(model, tmp_path / name, format="vmoe")
        out = ("--out", tmp_path / f"{name}.json", "--data", "digits", "--json")
        result = vmoe("capacity", "--checkpoint", path, "--budget", "0.95x", *FEW, *out)
        assert result.returncode == 0, result.stderr
        reports.append(json.loads(result.stdout)["trade_off"])
    assert [row["cost"] for row in reports[0]] == [row["cost"] for row in reports[1]]


@pytest.mark.slow
def test_the_budget_can_be_measured_time(tiny_run: Path, tmp_path: Path) -> None:
    file = tmp_path / "file.json"
    arguments = ("--by", "time", "--budget", "1x", "--out", file, "--json")
    result = vmoe("capacity", "--checkpoint", tiny_run, *arguments, *FEW)
    assert result.returncode == 0, result.stderr
    report, content = json.loads(result.stdout), json.loads(file.read_text())
    assert report["by"] == content["by"] == "time" and report["measured"] > 0
    costs = {row["budget"]: row["cost"] for row in report["trade_off"]}
    assert all(cost <= budget for budget, cost in costs.items()) and costs[1] == content["cost"]
    _, message = evaluated("--checkpoint", tiny_run, "--routing-file", file)
    assert f"routing of {file}: " in message and "x the time, chosen on" in message


@pytest.mark.process
def test_settings_are_written_under_the_numbers_of_the_sparse_blocks(tmp_path: Path) -> None:
    """Blocks 1 and 2 of three, of which the first is dense."""
    layer = MoEConfig(num_experts=2, router=TokenChoice(k=1))
    small = dict(patch_size=4, width=8, depth=3, mlp_dim=8, num_heads=2, image_size=8)
    config = ViTConfig(**small, num_classes=10, sparse_blocks=(1, 2), moe=layer)
    digits = stored_of(config)._replace(class_names=tuple("0123456789"))
    write(digits, tmp_path / "model", format="vmoe")
    file = tmp_path / "file.json"
    arguments = ("capacity", "--checkpoint", tmp_path / "model", "--budget", "0.95x", "--out", file)
    result = vmoe(*arguments, *FEW)
    assert result.returncode == 2
    assert "data is missing: the checkpoint does not name its training data" in result.stderr
    result = vmoe(*arguments, *FEW, "--data", "digits:validation")
    assert result.returncode == 0, result.stderr
    assert list(json.loads(file.read_text())["blocks"]) == ["1", "2"]
    assert library.load(tmp_path / "model", routing_file=file).model.config != config


def test_predict_and_load_use_it_too(run: Path, tmp_path: Path) -> None:
    pixels = np.random.default_rng(0).integers(0, 255, (8, 8, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(tmp_path / "a.png")
    result = vmoe("predict", "--checkpoint", run / "checkpoints" / "last", tmp_path / "a.png")
    assert result.returncode == 0 and f"routing of {run / 'routing.json'}" in result.stderr
    loaded = library.load(run, routing_file=True)
    assert loaded.routing_file is not None and loaded.routing_file[0] == run / "routing.json"
    content = loaded.routing_file[1]
    assert loaded.model.config == content.apply(library.load(run).model.config)
    with pytest.raises(UsageError, match="routing_file=True: give this or routing settings"):
        library.load(run, routing_file=True, routing=RoutingOverrides(k=1))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"format": 3}, "format 3, this version of vmoe reads 1 and 2"),
        ({"blocks": {}}, "for sparse blocks none, but those of this model are 0"),
        ({"budget": "all"}, "RoutingFile budget: Input should be a valid number"),
        (
            {"blocks": {"0": {"k": 9, "capacity_factor": 1.0, "priority": "order"}}},
            "moe.router.k=9",
        ),
        (
            {"blocks": {"0": {"k": 0, "capacity_factor": 1.0, "priority": "order"}}},
            "k=0: use at least 1",
        ),
        ('{"format": 2', "not JSON"),
        ("null", "not a file of vmoe capacity"),
        ('{"format": ' + "[" * 10_000, "not JSON"),
    ],
)
def test_a_bad_file_is_one_line_that_names_it(
    run: Path, tmp_path: Path, change: dict[str, object] | str, message: str
) -> None:
    file, text = tmp_path / "other.json", (run / "routing.json").read_text()
    file.write_text(change if isinstance(change, str) else json.dumps(json.loads(text) | change))
    with pytest.raises(UsageError) as error:
        library.load(run, routing_file=file)
    assert str(error.value).startswith(f"{file}: ") and message in str(error.value)
    assert "\n" not in str(error.value)


MODEL = ("--checkpoint", "vmoe_fashion_mnist", "--data", "fashion_mnist_sample:test")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (
            ("--budget", "much"),
            "budget=much: use a fraction in (0, 1] of the cost of the model as trained",
        ),
        (("--budget", "1.2x"), "budget=1.2x: use a fraction"),
        ((), "--budget"),
        (("--budget", "0.8x"), "is not a run folder: give a file to write with --out"),
        (
            ("--budget", "0.6x", "--out", "a.json"),
            "budget=0.6: the smallest that can be reached is",
        ),
        (("--budget", "0.8x", "--out", "gone/a.json"), "out=gone/a.json: no folder gone"),
        (("--budget", "0.8x", "--checkpoint", "vit_fashion_mnist"), "no block of this model is"),
    ],
)
def test_wrong_arguments_are_one_line(arguments: tuple[str, ...], message: str) -> None:
    result = vmoe("capacity", *MODEL, *arguments)
    assert result.returncode == 2 and message in result.stderr
    assert result.stderr.count("\n") == 1
