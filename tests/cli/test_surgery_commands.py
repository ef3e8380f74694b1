"""``vmoe upcycle`` and ``vmoe prune`` on trained models, and training from what they write."""

import dataclasses
import json
import os
from pathlib import Path
from typing import get_args

import numpy as np
import pytest
from PIL import Image

import vmoe as library
from tests.command import ROOT, TINY, start, vmoe
from tests.random_models import outputs, random_images, stored_model
from vmoe.analysis import collect, statistics
from vmoe.checkpoints import write
from vmoe.cli.upcycle import UpcycleArgs
from vmoe.config import Soft
from vmoe.data.sources import open_source
from vmoe.evaluate import evaluate
from vmoe.passes import inputs
from vmoe.surgery.starts import STARTS


@pytest.fixture(scope="module")
def average(tiny_run: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict]:
    """A dense model, the mean of the experts of a run, and what the command reports of both."""
    path = tmp_path_factory.mktemp("average") / "dense"
    result = vmoe("prune", tiny_run, path, "--num-experts", "0", "--rule", "average", "--json")
    assert result.returncode == 0, result.stderr
    return path, json.loads(result.stdout)


def accuracy(checkpoint: Path) -> float:
    loaded = library.load(checkpoint)
    source = open_source("digits", "validation")
    return evaluate(loaded.model, source, preprocessing=loaded.preprocessing).accuracy


@pytest.mark.process
def test_an_upcycled_model_has_its_parents_logits_and_can_be_trained_on(
    average: tuple[Path, dict], tmp_path: Path
) -> None:
    parent, _ = average
    result = vmoe("upcycle", parent, tmp_path / "sparse", "--blocks", "0", "--num-experts", "4")
    assert result.returncode == 0, result.stderr
    assert f"its logits are those of {parent}, up to rounding" in result.stdout
    dense, sparse = (library.load(path).model for path in (parent, tmp_path / "sparse"))
    images = random_images(8, 5)
    np.testing.assert_allclose(outputs(dense, images), outputs(sparse, images), atol=1e-5)
    assert accuracy(tmp_path / "sparse") == accuracy(parent) > 0
    result = vmoe(
        *("train", "--config", TINY, "--workdir", tmp_path / "run", "--steps", "1"),
        *("--optim.warmup-steps", "0", "--init", tmp_path / "sparse"),
        *("--model.moe.router.normalize-weights", "--model.moe.router.dropless"),
    )
    assert result.returncode == 0, result.stderr
    assert "step 60: " in result.stderr and " parameters loaded" in result.stderr


def test_upcycling_says_why_logits_change(tmp_path: Path) -> None:
    source = ROOT / "tests" / "golden" / "weights" / "timm_vit"
    options = ["--no-normalize-weights", "--capacity-factor", "1.0", "--start", "noise"]
    result = vmoe("upcycle", source, tmp_path / "x", *options)
    assert result.returncode == 0, result.stderr
    assert "8 experts in blocks (1,)\n" in result.stdout
    for reason in ("are not normalized", "beyond the capacity are dropped", "noise is added"):
        assert reason in result.stdout
    again = vmoe("upcycle", tmp_path / "x", tmp_path / "y", "--blocks", "1")
    assert again.returncode == 2 and "is sparse already" in again.stderr


def test_the_command_has_every_start_and_reads_the_images_that_one_clusters(
    tmp_path: Path,
) -> None:
    (start,) = (field for field in dataclasses.fields(UpcycleArgs) if field.name == "start")
    assert get_args(start.type) == tuple(STARTS)
    source = ROOT / "tests" / "golden" / "weights" / "timm_vit"
    data = ["--data", "emoji_sample:test", "--images", "2"]
    result = vmoe("upcycle", source, tmp_path / "x", "--start", "clusters", *data)
    assert result.returncode == 0, result.stderr
    assert f"its logits are those of {source}, up to rounding" in result.stdout
    columns = library.load(tmp_path / "x").model.blocks[1].mlp.gate.kernel[...]
    np.testing.assert_allclose(np.linalg.norm(columns, axis=0), 1, rtol=1e-5)
    low = vmoe("upcycle", source, tmp_path / "y", "--start", "low_rank", "--rank", "3")
    assert low.returncode == 0, low.stderr
    assert library.load(tmp_path / "y").model.config.moe.experts.mlp_dim == 3


@pytest.mark.slow
def test_pruning_reports_the_accuracy_before_and_after(tiny_run: Path, tmp_path: Path) -> None:
    result = vmoe("prune", tiny_run, tmp_path / "two", "--num-experts", "2", "--json")
    assert result.returncode == 0, result.stderr
    report = json.loads(result.stdout)
    written = f"{report['after']['parameters']:,} parameters written"
    assert f"{tmp_path / 'two'}: {written}\n" in result.stderr
    assert report["data"] == "digits:validation"
    assert report["before"]["accuracy"] == accuracy(tiny_run)
    assert report["after"]["accuracy"] == accuracy(tmp_path / "two")
    assert (report["before"]["experts"], report["after"]["experts"]) == ("4", "2")
    loaded = library.load(tiny_run)
    source = open_source("digits", "validation")
    batches = inputs(loaded.model, source, loaded.preprocessing)
    (block,) = statistics(collect(loaded.model, batches)).values()
    loads = block.choices
    assert loads.sum() == 2 * 5 * len(source)  # two choices of each of five tokens
    columns = np.sort(np.argsort(-loads, kind="stable")[:2])
    kernel = np.asarray(loaded.model.blocks[0].mlp.gate.kernel[...])
    pruned = library.load(tmp_path / "two").model.blocks[0].mlp.gate.kernel[...]
    np.testing.assert_array_equal(pruned, kernel[:, columns])


@pytest.mark.slow
def test_the_other_rules_prune_and_experts_become_one_mlp(
    tiny_run: Path, average: tuple[Path, dict], tmp_path: Path
) -> None:
    digits, lines = open_source("digits", "test"), ["path,labels,split"]
    for i in range(30):  # of three, one has no label
        Image.fromarray(digits.images[i]).save(tmp_path / f"{i}.png")
        lines.append(f"{i}.png,{digits.labels[i] if i % 3 else ''},test")
    (tmp_path / "list.csv").write_text("\n".join(lines))
    some = ["--data", f"manifest:{tmp_path / 'list.csv'}:test"]
    for options, images in (
        (["--num-experts", "3", "--rule", "random", *some], 20),
        (["--num-experts", "3", "--rule", "router_norm", "--before", tiny_run], 180),
    ):
        result = vmoe("prune", tiny_run, tmp_path / str(options[3]), *options)
        assert result.returncode == 0, result.stderr
        assert "after" in result.stdout and result.stdout.count(f", {images} images ") == 2
    dense, report = average
    assert report["after"]["images"] == 180 and report["after"]["experts"] == "0"
    assert library.load(dense).model.config.sparse_blocks == ()


@pytest.mark.process
def test_a_pruned_model_is_written_although_the_reader_of_stdout_is_gone(
    tiny_run: Path, tmp_path: Path
) -> None:
    reader, writer = os.pipe()
    os.close(reader)
    arguments = ("prune", tiny_run, tmp_path / "x", "--num-experts", "0", "--rule", "average")
    with start(*arguments, environment={"PYTHONUNBUFFERED": "1"}, output=writer) as process:
        assert process.wait() == 141
    assert library.load(tmp_path / "x").model.config.sparse_blocks == ()


def test_an_average_that_is_impossible_is_refused_before_the_data_are_read(tmp_path: Path) -> None:
    """The model names no data."""
    moe = dict(router=Soft())
    write(stored_model("vmoe_test_last2_e4", moe=moe), tmp_path / "soft", format="vmoe")
    options = ("--num-experts", "0", "--rule", "average")
    result = vmoe("prune", tmp_path / "soft", tmp_path / "x", *options)
    assert result.returncode == 2 and not (tmp_path / "x").exists()
    assert result.stderr.startswith("vmoe: block 1 has router soft, whose slots are trained")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--num-experts", "1"], "k=2"),
        (["--num-experts", "9"], "cannot keep 9 of 4 experts"),
        (["--num-experts", "2", "--rule", "router_norm"], "router_norm needs --before"),
        (["--num-experts", "2", "--rule", "average"], "use 0 with average"),
        (
            ["--num-experts", "0", "--rule", "average", "--k", "1"],
            "--k 1 has no effect with --rule average",
        ),
    ],
)
def test_pruning_that_is_impossible_is_refused_and_writes_nothing(
    options: list[str], message: str, tiny_run: Path, tmp_path: Path
) -> None:
    result = vmoe("prune", tiny_run, tmp_path / "x", *options)
    assert result.returncode == 2 and message in result.stderr, result.stderr
    assert result.stderr.count("\n") == 1 and not (tmp_path / "x").exists()
