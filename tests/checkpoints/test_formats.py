"""Conversion between formats, and the content of files of weights, through the real command."""

import csv
import importlib.util
import json
import shutil
from pathlib import Path

import jax
import numpy as np
import pytest
from PIL import Image
from scipy.special import expit

import vmoe as library
from tests.command import vmoe
from tests.random_models import outputs
from vmoe.checkpoints import read, vmoe_format, write
from vmoe.config import RoutingOverrides
from vmoe.data.sources import open_source
from vmoe.errors import Failure, UsageError

GOLDEN = Path(__file__).parents[1] / "golden"
TIMM, NPZ = GOLDEN / "weights" / "timm_vit", GOLDEN / "weights" / "augreg" / "model.npz"
PUBLISHED = GOLDEN / "published" / "sharded" / "ckpt"


def assert_same_params(one: object, other: object) -> None:
    jax.tree.map(np.testing.assert_array_equal, one, other)


@pytest.mark.parametrize("source", [TIMM, NPZ, PUBLISHED], ids=lambda path: path.parent.name)
def test_a_converted_model_is_the_same_with_all_that_belongs_to_it(
    source: Path, tmp_path: Path
) -> None:
    write(read(source), tmp_path / "ours", format="vmoe")
    before, after = read(source), read(tmp_path / "ours")
    assert_same_params(before.params, after.params)
    for field in ("config", "class_names", "preprocessing", "step"):
        assert getattr(before, field) == getattr(after, field)
    assert after.origin.copied_from == before.origin.format
    assert "| parameters | " in (tmp_path / "ours" / "README.md").read_text()
    modes = {path.stat().st_mode for path in (tmp_path / "ours").iterdir()}
    assert len(modes) == 1, "safetensors writes files that only their owner can read"


def test_the_command_converts_to_our_format_and_overwrites_nothing(tmp_path: Path) -> None:
    result = vmoe("convert", TIMM, tmp_path / "ours")
    assert result.returncode == 0, result.stderr
    assert_same_params(read(TIMM).params, read(tmp_path / "ours").params)
    again = vmoe("convert", TIMM, tmp_path / "ours")
    assert again.returncode == 2 and "it is not empty; use another folder" in again.stderr


def test_a_run_is_converted_and_split_into_files(tiny_run: Path, tmp_path: Path) -> None:
    stored = read(tiny_run)
    vmoe_format.write(tmp_path / "split", stored, shard_bytes=10_000)
    assert len(list((tmp_path / "split").glob("*.safetensors"))) > 2
    loaded = library.load(tmp_path / "split")
    assert_same_params(read(tmp_path / "split").params, stored.params)
    assert (loaded.class_names, loaded.step) == (stored.class_names, 60)
    result = vmoe("evaluate", "--checkpoint", tmp_path / "split", "--data", "digits", "--json")
    expected = vmoe("evaluate", "--checkpoint", tiny_run, "--json")
    for name in ("accuracy", "cross_entropy", "dropped", "step"):
        assert json.loads(result.stdout)[name] == json.loads(expected.stdout)[name]


def test_a_model_trained_with_the_sigmoid_loss_predicts_by_it_also_when_converted(
    tiny_run: Path, tmp_path: Path
) -> None:
    shutil.copytree(tiny_run, tmp_path / "run")
    config = tmp_path / "run" / "config.json"
    config.write_text(config.read_text().replace('"loss": "softmax"', '"loss": "sigmoid"'))
    write(read(tmp_path / "run"), tmp_path / "converted", format="vmoe")
    library.load(tmp_path / "converted").save(tmp_path / "saved")
    assert all(library.load(tmp_path / name).sigmoid for name in ("run", "converted", "saved"))
    data = ("--data", "digits:validation", "--predictions", tmp_path / "images.csv")
    model = ("--checkpoint", tmp_path / "converted", "--routing.dropless", "True")
    result = vmoe("evaluate", *model, *data, "--json")
    assert json.loads(result.stdout)["probabilities"] == "sigmoid", result.stderr
    with (tmp_path / "images.csv").open(newline="") as lines:
        probabilities = [float(row["probability"]) for row in csv.DictReader(lines)]
    loaded = library.load(tmp_path / "run", routing=RoutingOverrides(dropless=True))
    images = loaded.preprocess(open_source("digits", "validation").images)
    expected = expit(np.asarray(outputs(loaded.model, images)).max(1))
    np.testing.assert_allclose(probabilities, expected, atol=1e-4)
    Image.fromarray(open_source("digits", "validation").images[0]).save(tmp_path / "0.png")
    shown = vmoe("predict", *model, tmp_path / "0.png").stdout
    assert "sigmoid probability" in shown and f"{expected[0]:.1%}" in shown
    content = json.loads((tmp_path / "saved" / "config.json").read_text())
    for loss, sigmoid in {"softmax": False, None: False}.items():
        content = {name: value for name, value in content.items() if name != "loss"}
        older = content if loss is None else content | {"loss": loss}
        older = older | {"origin": {"format": "run"}}
        (tmp_path / "saved" / "config.json").write_text(json.dumps(older))
        loaded = library.load(tmp_path / "saved")
        assert (loaded.sigmoid, loaded.origin.copied_from) == (sigmoid, "run")
    (tmp_path / "saved" / "config.json").write_text(json.dumps(content | {"loss": "hinge"}))
    with pytest.raises(Failure, match="corrupt .loss 'hinge'"):
        library.load(tmp_path / "saved")


def test_published_files_go_to_ours_and_back_bit_by_bit(tmp_path: Path) -> None:
    write(read(PUBLISHED), tmp_path / "ours", format="vmoe")
    result = vmoe(
        "convert", tmp_path / "ours", tmp_path / "back", "--format", "published", "--shards", "2"
    )
    assert result.returncode == 0, result.stderr
    assert_same_params(read(PUBLISHED).params, read(tmp_path / "back").params)


def test_programs_are_written_by_the_command(tiny_run: Path, tmp_path: Path) -> None:
    result = vmoe("convert", tiny_run, tmp_path / "program", "--format", "jax")
    assert result.returncode == 0, result.stderr
    assert (tmp_path / "program" / "model.jaxexport").stat().st_size > 1000
    result = vmoe("inspect", tmp_path / "program")
    assert result.returncode == 2 and "a program of jax.export" in result.stderr
    if importlib.util.find_spec("jax2onnx") is None:
        result = vmoe("convert", "no_such_model", tmp_path / "model.onnx", "--format", "onnx")
        assert result.returncode == 2 and "jax2onnx" in result.stderr, "told before it reads"
        assert result.stderr.count("\n") == 1 and not (tmp_path / "model.onnx").exists()


def test_a_model_that_the_published_format_cannot_represent_is_refused(tmp_path: Path) -> None:
    result = vmoe("convert", TIMM, tmp_path / "x", "--format", "published")
    assert result.returncode == 2 and not list(tmp_path.iterdir())
    assert "model.gelu=erf: published checkpoints do not store this field" in result.stderr


@pytest.mark.parametrize("name", ["config.json", "model.safetensors"])
def test_a_changed_file_of_ours_is_refused(name: str, tmp_path: Path) -> None:
    write(read(NPZ), tmp_path / "ours", format="vmoe")
    path = tmp_path / "ours" / name
    content = path.read_bytes()
    path.write_bytes(content.replace(b"tanh", b"gelu") if name == "config.json" else content[:-1])
    with pytest.raises(Failure, match=f"{name}: corrupt"):
        read(tmp_path / "ours")


def test_inspect_lists_every_array_and_the_model() -> None:
    result = vmoe("inspect", TIMM)
    assert result.returncode == 0, result.stderr
    assert (
        "blocks/1/attention/value/kernel" in result.stdout and "2 blocks, width 24" in result.stdout
    )
    report = json.loads(vmoe("inspect", PUBLISHED, "--json").stdout)
    assert report["format"] == "published" and report["config"]["sparse_blocks"] == [1, 3]
    (router,) = [each for each in report["arrays"] if "encoderblock_3/Moe/Router" in each["name"]]
    assert router["shape"] == [16, 4] and router["paths"] == ["blocks/3/mlp/router/kernel"]


def test_inspect_names_what_cannot_be_represented(tmp_path: Path) -> None:
    result = vmoe("inspect", GOLDEN / "weights" / "refused" / "timm_registers")
    assert result.returncode == 0, result.stderr
    assert "unknown" in result.stdout and "it has reg_token" in result.stdout


def test_a_pickle_is_refused_with_the_remedy(tmp_path: Path) -> None:
    shutil.copy(NPZ, tmp_path / "model.pth")
    with pytest.raises(UsageError, match="pickle files are not read"):
        read(tmp_path / "model.pth")


@pytest.mark.parametrize("format", ["vmoe", "published"])
def test_a_full_disk_is_one_line_and_leaves_nothing(format: str, tmp_path: Path) -> None:
    arguments = ("convert", "vit_fashion_mnist", tmp_path / "copy", "--format", format)
    result = vmoe(*arguments, max_file_size=100_000)
    assert result.returncode == 1 and result.stderr.count("\n") == 1, result.stderr
    assert result.stderr.startswith(f"vmoe: {tmp_path / 'copy'}: cannot be written (")
    assert not list(tmp_path.iterdir())
