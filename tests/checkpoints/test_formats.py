"""Conversion between formats, and the content of files of weights, through the real command."""

import csv
import importlib.util
import json
import shutil
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest
from PIL import Image
from safetensors.numpy import load_file, save_file
from scipy.special import expit

import vmoe as library
from tests.command import forked, vmoe
from tests.random_models import outputs, stored_model
from vmoe.checkpoints import read, vmoe_format, write
from vmoe.config import (
    AttentionExpert,
    BiasBalanced,
    CnnExpert,
    CosineGate,
    ExpertList,
    GatedMlpExpert,
    Hash,
    RoutingOverrides,
    ZeroExpert,
    replace,
)
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


@pytest.mark.parametrize(
    "moe",
    [
        dict(experts=AttentionExpert(), gate=CosineGate()),
        dict(experts=ExpertList(each=(CnnExpert(), ZeroExpert()) * 20), router=Hash()),
        dict(experts=GatedMlpExpert(), router=BiasBalanced(), shared_experts=1),
    ],
    ids=lambda moe: moe["experts"].kind,
)
def test_a_model_of_any_experts_is_read_back(moe: dict[str, Any], tmp_path: Path) -> None:
    """The first has no axis of the hidden width of MLPs, the second none of 40 experts."""
    each = getattr(moe["experts"], "each", (None,) * 4)
    fields = dict(depth=1, sparse_blocks=(0,), moe=moe | dict(num_experts=len(each)))
    stored = stored_model("vmoe_test_last2_e4", **fields)
    after = read(write(stored, tmp_path / "ours", format="vmoe"))
    assert after.config == stored.config
    assert_same_params(after.params, stored.params)


def with_arrays(folder: Path, arrays: dict[str, np.ndarray]) -> None:
    """Replaces the arrays of a model in our format, and their SHA-256 in config.json."""
    save_file(arrays, folder / "model.safetensors")
    config = json.loads((folder / "config.json").read_text())
    config["sha256"]["model.safetensors"] = vmoe_format.sha256(folder / "model.safetensors")
    (folder / "config.json").write_text(json.dumps(config))


def test_a_router_state_that_is_missing_or_has_another_shape_is_refused_in_one_line(
    tmp_path: Path,
) -> None:
    moe = dict(router=BiasBalanced())
    stored = stored_model("vmoe_test_last2_e4", depth=1, sparse_blocks=(0,), moe=moe)
    folder = write(stored, tmp_path / "ours", format="vmoe")
    arrays, bias = load_file(folder / "model.safetensors"), "blocks/0/mlp/state/bias"
    for changed, message in (
        ({}, rf"missing: {bias}, unexpected: nothing"),
        ({bias: arrays[bias][:3]}, rf"{bias} has shape \(3,\), but \(4,\) fits the others"),
    ):
        with_arrays(folder, {name: x for name, x in arrays.items() if name != bias} | changed)
        with pytest.raises(Failure, match=rf"config.json: corrupt \(.*{message}") as caught:
            read(folder)
        assert "\n" not in str(caught.value)


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


@pytest.mark.slow
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
        assert result.returncode == 2 and "jax2onnx" in result.stderr, "said before it reads"
        assert result.stderr.count("\n") == 1 and not (tmp_path / "model.onnx").exists()


def test_heads_as_wide_as_those_of_published_models_may_be_named(tmp_path: Path) -> None:
    stored = read(PUBLISHED)
    named = replace(stored.config, head_dim=stored.config.dim_per_head)
    write(stored._replace(config=named), tmp_path / "ckpt", format="published")
    assert read(tmp_path / "ckpt").config == stored.config


def test_a_model_that_the_published_format_cannot_represent_is_refused(tmp_path: Path) -> None:
    result = vmoe("convert", TIMM, tmp_path / "x", "--format", "published")
    assert result.returncode == 2 and not list(tmp_path.iterdir())
    assert "model.activation=gelu: published checkpoints do not store this field" in result.stderr


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
    assert router["shape"] == [16, 4] and router["paths"] == ["blocks/3/mlp/gate/kernel"]


def test_inspect_names_what_cannot_be_represented(tmp_path: Path) -> None:
    result = vmoe("inspect", GOLDEN / "weights" / "refused" / "timm_distilled")
    assert result.returncode == 0, result.stderr
    assert "unknown" in result.stdout and "it has dist_token" in result.stdout


def test_a_pickle_is_refused_with_the_remedy(tmp_path: Path) -> None:
    shutil.copy(NPZ, tmp_path / "model.pth")
    with pytest.raises(UsageError, match="pickle files are not read"):
        read(tmp_path / "model.pth")


@pytest.mark.process
@pytest.mark.parametrize("format", ["vmoe", "published"])
def test_a_full_disk_is_one_line_and_leaves_nothing(format: str, tmp_path: Path) -> None:
    arguments = ("convert", "vit_fashion_mnist", tmp_path / "copy", "--format", format)
    result = forked(*arguments, max_file_size=100_000)
    assert result.returncode == 1 and result.stderr.count("\n") == 1, result.stderr
    assert result.stderr.startswith(f"vmoe: {tmp_path / 'copy'}: cannot be written (")
    assert not list(tmp_path.iterdir())
