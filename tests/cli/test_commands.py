"""The real command in a real process: what it prints, where, and its exit status."""

import contextlib
import csv
import dataclasses
import importlib.metadata
import itertools
import json
import math
import os
import pty
import re
import shutil
import subprocess
import sys
import termios
from pathlib import Path
from subprocess import CompletedProcess

import pytest
from PIL import Image

from tests.command import ROOT, TIME, TINY, forked, interpreter, start, vmoe, without_times
from tests.run_folder import rows, with_corrupt_newest
from vmoe.config import RoutingOverrides, replace
from vmoe.data.sources import open_source
from vmoe.errors import UsageError
from vmoe.evaluate import predict
from vmoe.evaluate.table import COLUMNS
from vmoe.factory import load
from vmoe.host.cache import MOST_PROGRAMS
from vmoe.train import InitFrom
from vmoe.train.init import read_source
from vmoe.workdir.layout import read_config

TIMM = ROOT / "tests" / "golden" / "weights" / "timm_vit"


@pytest.mark.process
def test_batches_of_one_image_train_and_the_progress_line_fits_a_terminal_of_80_columns(
    tmp_path: Path,
) -> None:
    reader, terminal = pty.openpty()
    termios.tcsetwinsize(terminal, (24, 80))
    arguments = ["train", "--config", TINY, "--workdir", str(tmp_path / "run"), "--steps", "60"]
    arguments += ["--batch-size", "1", "--data.mixup", "0", "--log-every", "10"]
    environment = {"COLUMNS": "", "LINES": "", "TERM": "xterm"}
    with start(*arguments, environment=environment, output=terminal) as process:
        output = b""
        with contextlib.suppress(OSError):  # the other end is closed
            while part := os.read(reader, 4096):
                output += part
        assert process.wait() == 0, output.decode()
    os.close(reader)
    lines = [re.sub(r"\x1b\[[0-9;?]*[a-zA-Z]", "", line) for line in output.decode().split("\r")]
    progress = [line for line in lines if "loss" in line and "validation" not in line]
    assert progress and all(len(line.strip()) <= 80 for line in progress)
    pattern = r"60/60 +\S+ left loss \d\.\d+ acc \S+% lr \S+ dropped \S+% \S+ img/s"
    assert re.search(pattern, progress[-1]), progress[-1]


def test_a_run_is_complete_for_a_command_that_gives_its_length_in_epochs(
    tiny_run: Path, tmp_path: Path
) -> None:
    workdir = tmp_path / "run"
    shutil.copytree(tiny_run, workdir)
    epochs = ("--epochs", "1.52")  # of 1,257 images
    result = vmoe("train", "--config", TINY, "--workdir", workdir, *epochs)
    assert result.returncode == 0 and "already complete (60 of 60 steps)" in result.stderr


@pytest.mark.process
def test_a_new_run_starts_from_the_parameters_of_another(tiny_run: Path, tmp_path: Path) -> None:
    source, workdir = tmp_path / "source", tmp_path / "run"
    shutil.copytree(tiny_run, source)
    arguments = ["train", "--config", TINY, "--workdir", workdir, "--steps", "30", "--seed", "1"]
    arguments += ["--log-every", "10"]
    result = vmoe(*arguments, "--init", source)
    assert result.returncode == 0, result.stderr
    assert f"starting from {source}, step 60" in result.stderr
    before = rows(workdir)
    assert float(before[0]["loss"]) < float(rows(tiny_run)[0]["loss"])
    # as if it had been killed before the first checkpoint
    shutil.rmtree(workdir / "checkpoints")
    result = vmoe(*arguments)
    assert result.returncode == 0 and rows(workdir) == before, result.stderr
    assert "there is no checkpoint, so the run starts again; its rows are kept" in result.stderr
    assert len((workdir / "metrics.csv.old").read_text().splitlines()) == 1 + len(before)
    model = read_config(workdir).model
    for given, message in [
        (InitFrom(str(tiny_run)), f"its run began from {source}, not from {tiny_run}"),
        (InitFrom(str(source), new_head=True), f"not from {source} (new_head)"),
    ]:
        with pytest.raises(UsageError, match=re.escape(message)):
            read_source(given, workdir, model)
    (workdir / "checkpoints").rename(tmp_path / "others")
    with pytest.raises(UsageError, match="the parameters do not fit the model: "):
        read_source(InitFrom(str(source)), workdir, replace(model, width=32))
    shutil.rmtree(source / "checkpoints")
    (tmp_path / "others").rename(source / "checkpoints")
    message = f"{source}: its parameters have changed since the run in {workdir} began"
    with pytest.raises(UsageError, match=re.escape(message)):
        read_source(None, workdir, model)


@pytest.fixture(scope="module")
def expert_choice(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, CompletedProcess[str]]:
    """A run whose experts choose their tokens, and the command that extended it to three steps."""
    folder = tmp_path_factory.mktemp("expert_choice")
    (folder / "recipe.py").write_text(
        "from pathlib import Path\n"
        "from vmoe.config import ExpertChoice, load, replace\n"
        f"config = load(Path({TINY!r}))\n"
        "moe = replace(config.model.moe, router=ExpertChoice(capacity_factor=0.5))\n"
        "config = replace(config, optim=dict(warmup_steps=0), log_every=1, model=dict(moe=moe))\n"
    )
    workdir = folder / "run"
    first = vmoe("train", "--config", folder / "recipe.py", "--workdir", workdir, "--steps", "1")
    assert first.returncode == 0, first.stderr
    config = workdir / "config.json"
    result = vmoe("train", "--config", config, "--workdir", workdir, "--images", str(3 * 32))
    assert result.returncode == 0, result.stderr
    return workdir, result


@pytest.mark.process
def test_a_run_is_extended_with_its_config_json_and_more_steps_and_keeps_its_old_config(
    expert_choice: tuple[Path, CompletedProcess[str]],
) -> None:
    workdir, result = expert_choice
    assert (
        "extended from 1 to 3 steps; the cosine schedule now ends at step 3, so the learn"
        in result.stderr
    )
    assert "resumed from step 1 of 3" in result.stderr and "3 steps" in result.stdout
    old, new = (json.loads((workdir / f"config{x}.json").read_text()) for x in (".1", ""))
    assert (old["steps"], new["steps"]) == (1, 3) and old | {"steps": 3} == new
    config = workdir / "config.1.json"
    result = vmoe("train", "--config", config, "--workdir", workdir)
    assert result.returncode == 2 and "steps is 3 there and 1 here" in result.stderr
    assert "(0.07637 and 0.02546 epochs): use the config of that run, or another" in result.stderr


@pytest.mark.process
def test_a_run_says_what_it_compiles_before_it_does_and_that_it_is_at_chance(
    expert_choice: tuple[Path, CompletedProcess[str]],
) -> None:
    """Its three steps teach it nothing."""
    lines = expert_choice[1].stderr.splitlines()
    assert all(re.match(f"{TIME} .", line) for line in lines), lines
    found = [
        next((i for i, x in enumerate(lines) if re.fullmatch(f"{TIME} {pattern}", x)), -1)
        for pattern in (
            "compiling the training step",
            r"compiled the training step in \d+\.\d s",
            r"step 2/3, 67%, epoch 0\.05  loss .*",  # the first of this process
            r"step 3/3, 100%, epoch 0\.08  loss .*",
            r"saving step 3",
            r"saving step 3: \d+\.\d s",
            r"evaluating validation \(compiling first\)",
            r"evaluating validation \(compiling first\): \d+\.\d s",
            r"step 3/3, 100%, epoch .*  validation .*",
            "validation: the accuracy is not clearly above 10.*",
        )
    ]
    assert -1 not in found and found == sorted(found), (found, lines)


@pytest.mark.process
def test_files_whose_first_row_is_that_of_the_checkpoint_are_continued(
    expert_choice: tuple[Path, CompletedProcess[str]],
) -> None:
    workdir, result = expert_choice
    assert "lost" not in result.stderr
    for name, expected in (("metrics", "123"), ("evaluations", "13"), ("experts", 4 * "123")):
        steps = [row["step"] for row in rows(workdir, name)]
        assert steps == sorted(expected), name


@pytest.mark.process
def test_the_rate_is_left_out_until_it_is_known(
    expert_choice: tuple[Path, CompletedProcess[str]],
) -> None:
    workdir, result = expert_choice
    progress = [
        line for line in result.stderr.splitlines() if re.search(r" step ./3, .*  loss", line)
    ]
    assert ["images/s" in line for line in progress] == [False, True], progress
    with (workdir / "metrics.csv").open() as file:
        rates = {row["step"]: row["images_per_second"] for row in csv.DictReader(file)}
    assert [step for step, rate in rates.items() if not rate] == ["1", "2"]


@pytest.mark.process
def test_where_experts_choose_tokens_without_an_expert_are_reported_and_no_drops(
    expert_choice: tuple[Path, CompletedProcess[str]],
) -> None:
    workdir, _ = expert_choice
    row = rows(workdir)[-1]
    assert row["dropped"] == "" and float(row["unprocessed"]) > 0
    assert "block0/unprocessed" in row and "block0/dropped" not in row
    result = vmoe("evaluate", "--checkpoint", workdir)
    assert "tokens without a routed expert" in result.stdout and "dropped" not in result.stdout


@pytest.mark.process
def test_a_run_starts_from_weights_of_timm_with_a_new_head_and_other_positions(
    tmp_path: Path,
) -> None:
    workdir = tmp_path / "run"
    arguments = ["train", "--config", TINY, "--workdir", workdir, "--steps", "2"]
    arguments += ["--optim.warmup-steps", "1", "--init", TIMM, "--model.patch-size", "4"]
    arguments += ["--model.width", "24", "--model.mlp-dim", "48", "--model.num-heads", "3"]
    arguments += ["--model.num-classes", "11", "--model.depth", "2", "--model.sparse-blocks"]
    result = vmoe(*arguments, "--model.activation", "gelu")
    assert result.returncode == 0, result.stderr
    lines = without_times(result.stderr)
    assert f"starting from {TIMM.relative_to(ROOT)}: 37 parameters loaded" in lines
    assert "2 new: head/classes/bias, head/classes/kernel" in lines
    assert "2 dropped: head/classes/bias, head/classes/kernel" in lines
    assert "1 resized: positions/embedding" in lines
    model = read_config(workdir).model
    for field, message in [
        (
            {"activation": "gelu_tanh"},
            "model.activation=gelu_tanh: the parameters were trained with model.activation=gelu",
        ),
        ({"sparse_blocks": (1,)}, "only in the model: blocks/1/mlp/experts/.* or a partial load"),
    ]:
        with pytest.raises(UsageError, match=message):
            read_source(InitFrom(str(TIMM)), tmp_path / "new", replace(model, **field))


def test_the_version_is_printed() -> None:
    result = vmoe("--version")
    assert result.returncode == 0
    assert result.stdout == f"vmoe {importlib.metadata.version('vmoe')}\n"


def test_evaluate_uses_the_test_split_by_default_and_can_lower_the_capacity(tiny_run: Path) -> None:
    result = vmoe("evaluate", "--checkpoint", tiny_run)
    assert result.returncode == 0, result.stderr
    assert "digits:test" in result.stdout and "accuracy" in result.stdout
    assert "not clearly above" not in result.stdout
    assert (
        "routing: no problem found: no dead expert (below 1% of the mean load), " in result.stdout
    )
    options = ("--data", "digits:validation", "--json", "--routing.capacity-factor", "0.25")
    report = json.loads(vmoe("evaluate", "--checkpoint", tiny_run, *options).stdout)
    assert report["data"] == "digits:validation" and report["images"] == 180
    assert report["dropped"] > 0.5
    assert "dropped" in [finding["kind"] for finding in report["findings"]]


@pytest.mark.process
def test_an_evaluation_whose_row_cannot_be_written_is_printed_and_its_other_file_is_written(
    tiny_run: Path, tmp_path: Path
) -> None:
    header = (",".join(COLUMNS) + "\r\n").encode()
    file = tmp_path / "rows.csv"
    file.write_bytes(header.ljust(20_000 - 2, b",") + b"\r\n")
    before = file.read_bytes()
    files = ("--csv", file, "--predictions", tmp_path / "images.csv")
    result = forked("evaluate", "--checkpoint", tiny_run, *files, max_file_size=20_050)
    assert result.returncode == 1 and "accuracy" in result.stdout
    last = result.stderr.splitlines()[-1]  # JAX may say that it cannot write to its cache
    assert last == f"vmoe: {file}: cannot be written (No space left on device)"
    assert file.read_bytes() == before
    assert len((tmp_path / "images.csv").read_text().splitlines()) == 361


def test_evaluate_uses_the_test_split_of_a_run_on_a_named_split(
    tiny_run: Path, tmp_path: Path
) -> None:
    workdir = tmp_path / "run"
    shutil.copytree(tiny_run, workdir)
    config = json.loads((workdir / "config.json").read_text())
    config["data"]["name"] = "digits:train"
    (workdir / "config.json").write_text(json.dumps(config))
    report = json.loads(vmoe("evaluate", "--checkpoint", workdir, "--json").stdout)
    assert report["data"] == "digits:test"
    result = vmoe("probe", "--checkpoint", workdir, "--shots", "1")
    assert result.returncode == 0 and "1 shot" in result.stdout, result.stderr


def test_an_older_checkpoint_is_evaluated_if_the_newest_is_corrupt(
    tiny_run: Path, tmp_path: Path
) -> None:
    workdir = tmp_path / "run"
    with_corrupt_newest(tiny_run, workdir, step=60, newest=70)
    result = vmoe("evaluate", "--checkpoint", workdir, "--json")
    assert result.returncode == 0 and json.loads(result.stdout)["step"] == 60
    assert result.stderr.startswith(f"{workdir}: checkpoint 70 is corrupt (")


def test_predict_prints_the_classes_and_the_experts(tiny_run: Path, tmp_path: Path) -> None:
    Image.fromarray(open_source("digits", "test").images[0]).save(tmp_path / "digit.png")
    result = vmoe("predict", "--checkpoint", tiny_run, tmp_path / "digit.png", "--top", "2")
    assert result.returncode == 0, result.stderr
    assert (
        "digit.png" in result.stdout and "probability" in result.stdout and "block" in result.stdout
    )
    result = vmoe("predict", "--checkpoint", tiny_run, tmp_path / "digit.png", "--json")
    assert len(json.loads(result.stdout)[0]["classes"]) == 5


def test_predict_prints_a_line_for_each_of_several_images_and_writes_them_as_csv(
    tiny_run: Path, tmp_path: Path
) -> None:
    photos = tmp_path / "photos"
    photos.mkdir()
    files = [photos / f"{i}.png" for i in range(3)]
    for file, image in zip(files, open_source("digits", "test").images[:3], strict=True):
        Image.fromarray(image).save(file)
    (photos / "bad.png").write_bytes(b"no image")
    (photos / "notes.txt").touch()
    out = tmp_path / "out.csv"
    result = vmoe("predict", "--checkpoint", tiny_run, photos, "--predictions", out)
    expected = list(predict(load(tiny_run), files, top=2))
    lines = [f"{one.path}: {one.classes[0]} {one.probabilities[0]:.1%}" for one in expected]
    assert result.returncode == 1 and result.stdout.splitlines() == lines
    assert "3 of 4 images predicted, 1 other file was skipped\n" in result.stderr
    assert "vmoe: 1 of 4 images have no prediction: " in result.stderr
    with out.open(newline="") as file:
        table = list(csv.DictReader(file))
    assert [(row["image"], row["prediction"]) for row in table] == [
        (one.path, one.classes[0]) for one in expected
    ]
    assert float(table[0]["probability"]) == pytest.approx(expected[0].probabilities[0], abs=1e-4)
    result = vmoe("predict", "--checkpoint", tiny_run, *files, "--top", "2")
    second = f", {expected[0].classes[1]} {expected[0].probabilities[1]:.1%}"
    assert result.stdout.splitlines()[0] == lines[0] + second and "block" not in result.stdout
    result = vmoe("predict", "--checkpoint", tiny_run, *files, "--experts")
    assert result.returncode == 0 and result.stdout.count("block") == 6, result.stderr


def test_predict_takes_the_routing_and_the_image_size_of_an_evaluation(
    tiny_run: Path, tmp_path: Path
) -> None:
    file = tmp_path / "digit.png"
    Image.fromarray(open_source("digits", "test").images[0]).save(file)
    options = ("--routing.k", "1", "--image-size", "16", "--json")
    result = vmoe("predict", "--checkpoint", tiny_run, file, *options)
    assert result.returncode == 0, result.stderr
    loaded = load(tiny_run, routing=RoutingOverrides(k=1))
    larger = dataclasses.replace(loaded, preprocessing=loaded.preprocessing.scaled(16))
    (expected,) = predict(larger, [file])
    (printed,) = json.loads(result.stdout)
    assert printed["classes"] == expected.classes
    assert printed["probabilities"] == pytest.approx(expected.probabilities, abs=1e-5)
    assert printed["experts"]["0"] == pytest.approx(expected.experts[0], abs=1e-5)
    (unchanged,) = predict(load(tiny_run), [file])
    assert printed["probabilities"] != pytest.approx(unchanged.probabilities, abs=1e-3)


def test_models_and_summary_print_parameters_active_parameters_and_flops() -> None:
    result = vmoe("models", "vmoe_s32_*e8")
    assert "56,999,400" in result.stdout and "GFLOPs" in result.stdout
    models = json.loads(vmoe("models", "vit_test", "--json").stdout)
    assert models[0]["parameters"] == models[0]["active_parameters"]
    arguments = ("summary", "vmoe_s32_last2_e8", "--num-classes", "10")
    result = vmoe(*arguments)
    assert "56,491,530" in result.stdout, result.stderr
    summary = json.loads(vmoe(*arguments, "--json").stdout)
    assert summary["head_bias"] == pytest.approx(-math.log(10)) and summary["num_classes"] == 10


def test_pretrained_models_are_listed_with_sizes_and_their_authors_accuracies() -> None:
    result = vmoe("models", "vmoe_s32*", "--pretrained")
    assert result.returncode == 0, result.stderr
    assert "vmoe_s32_last2_e8.in1k_light  228 MB" in result.stdout
    assert "gs://vmoe_checkpoints/vmoe_s32_last2_ilsvrc2012_randaug_light1\n" in result.stdout
    assert "ImageNet 73.1%, ReaL 74.4%, V2 59.2% (measured by the authors)" in result.stdout
    assert "    accuracy: not published\n" in result.stdout
    assert "    capacity factor: 4.0, as in the authors' evaluation\n" in result.stdout
    (b16, _) = json.loads(vmoe("models", "*b16*", "--pretrained", "--json").stdout)
    assert b16["nbytes"] == 4 * 300_974_931 and b16["capacity_factor"] == 1.05
    assert b16["path"] == "gs://vmoe_checkpoints/vmoe_b16_imagenet21k_randaug_strong"
    result = vmoe("evaluate", "--checkpoint", "vmoe_s32_last2_e8.in22k", "--data", "digits")
    assert result.returncode == 2 and "has no weights with tag 'in22k': choose from" in (
        result.stderr
    )


@pytest.mark.process
def test_config_prints_the_run_as_json() -> None:
    config = json.loads(interpreter("config", "--config", TINY, "--optim.lr", "0.5").stdout)
    assert config["optim"]["lr"] == 0.5 and config["model"]["moe"]["router"]["kind"]


@pytest.mark.parametrize(
    "command", ["", "train", "evaluate", "predict", "models", "summary", "config", "plan"]
)
def test_every_command_has_help(command: str) -> None:
    result = vmoe(*filter(None, [command]), "--help")
    assert result.returncode == 0 and "vmoe" in result.stdout and not result.stderr


def test_the_help_of_training_shows_what_is_changed_first_and_names_the_way_to_all_others(
    tmp_path: Path,
) -> None:
    def listed(*words: str) -> set[str]:
        return {*re.findall(r"^  (--[\w.-]+)", vmoe("train", *words).stdout, re.MULTILINE)}

    every = {*re.findall(r"--[a-z][\w.-]*\w", vmoe("train", "--help", "all").stdout)}
    first = listed("--help")
    assert 25 < len(first) < 35 and first < every and len(every) > 150
    sections = {option[2:].partition(".")[0] for option in every if "." in option}
    for section in sections:
        own = {each for each in every if each.startswith(f"--{section}.") and ".no-" not in each}
        assert listed("--help", section) == own
    router = listed("--model.moe.router.kind", "hash", "-h", "model.moe.router")
    assert "--model.moe.router.k" in router and "--model.moe.router.priority" not in router
    soft = listed("--model.moe.router.kind", "soft", "--help")
    assert soft == first - {"--model.moe.router.k"}
    several = tmp_path / "several.py"
    several.write_text(
        "from vmoe.config import MoEConfig, TrainConfig, ViTConfig\n"
        "model = ViTConfig(sparse_blocks=(5, 7), moe=(MoEConfig(), MoEConfig()))\n"
        "config = TrainConfig(model=model)\n"
    )
    of_lists = listed("--config", str(several), "--help")
    assert of_lists == {each for each in first if not each.startswith("--model.moe.")}
    wrong = vmoe("train", "--help", "modl")
    assert wrong.returncode == 2 and "did you mean 'model'?" in wrong.stderr


@pytest.mark.process
def test_a_line_of_a_help_text_ends_where_the_next_word_does_not_fit() -> None:
    command = [sys.executable, "-m", "vmoe", "predict", "--help"]
    wide = os.environ | {"COLUMNS": "100"}
    shown = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, env=wide).stdout
    lines = [line.strip("│").rstrip() for line in shown.splitlines()]
    texts = [line if re.match(r" {27}\S", line) else "" for line in lines]  # beside their options
    follows = [(line, after) for line, after in itertools.pairwise(texts) if line and after]
    assert len(follows) > 5
    for line, after in follows:
        assert len(f"{line} {after.split()[0]}") > 97, line


def test_evaluating_a_run_leaves_an_unfinished_checkpoint_in_place(
    tiny_run: Path, tmp_path: Path
) -> None:
    for name in ("config.json", "classes.json"):
        shutil.copy(tiny_run / name, tmp_path)
    unfinished = tmp_path / "checkpoints" / "20.orbax-checkpoint-tmp"
    unfinished.mkdir(parents=True)
    result = vmoe("evaluate", "--checkpoint", tmp_path)
    assert result.returncode == 2 and result.stderr.count("\n") == 1
    assert "no checkpoint yet" in result.stderr and unfinished.is_dir()


@pytest.mark.process
@pytest.mark.parametrize("arguments", [["-c", "import vmoe"], ["-m", "vmoe", "--help"]])
def test_import_vmoe_and_help_import_neither_jax_nor_flax(arguments: list[str]) -> None:
    result = subprocess.run(
        [sys.executable, "-X", "importtime", *arguments], capture_output=True, text=True, cwd=ROOT
    )
    imported = {line.split("|")[-1].strip() for line in result.stderr.splitlines()}
    assert "vmoe" in imported and not imported & {"jax", "flax", "numpy", "pydantic"}


@pytest.mark.process
def test_commands_import_only_what_they_use() -> None:
    code = "import sys, vmoe.plan.candidates; print(*sys.modules); import vmoe.train.loop"
    result = subprocess.run(
        [sys.executable, "-c", f"{code}; print(*sys.modules)"],
        capture_output=True,
        text=True,
        cwd=ROOT,
    )
    plan, train = (set(line.split()) for line in result.stdout.splitlines())
    assert "vmoe.train.state" in plan
    assert not plan & {"vmoe.train.loop", "orbax", "grain", "tensorboardX"}
    assert {"vmoe.train.loop", "vmoe.surgery.clusters"} <= train
    assert not train & {"sklearn", "pandas", "scipy.optimize", "scipy.stats"}


def test_a_tilde_is_the_home_folder_wherever_a_path_is_given(
    tmp_path: Path, tiny_run: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A shell expands ~ at the start of a word alone, not in --workdir=~/run or folder:~/photos."""
    monkeypatch.setenv("HOME", str(tmp_path))
    for i in range(8):
        path = tmp_path / "photos" / "01"[i % 2] / f"{i}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (8, 8), (9 * i, 0, 0)).save(path)
    shutil.copytree(tiny_run, tmp_path / "run")
    for words in (
        ["predict", "--checkpoint=~/run", "~/photos/*/*.png", "--predictions=~/rows.csv"],
        ["evaluate", "--checkpoint=~/run", "--data=folder:~/photos:train", "--csv=~/all.csv"],
        ["config", "--config=~/run/config.json"],
        ["train", "--config=~/run/config.json", "--workdir=~/run", "--init=~/gone", "--seed=1"],
    ):
        result = vmoe(*words, cwd=tmp_path)
        assert result.returncode == (2 if words[0] == "train" else 0), result.stderr
    assert f"not from {tmp_path}/gone" in result.stderr  # its checkpoint decides
    assert len(rows(tmp_path, "rows")) == 8 and len(rows(tmp_path, "all")) == 1
    assert not (tmp_path / "~").exists()


@pytest.mark.process
def test_commands_keep_compiled_programs_for_this_processor_in_the_cache_folder(
    tmp_path: Path, tiny_run: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    Image.new("RGB", (8, 8)).save(tmp_path / "a.png")
    monkeypatch.delenv("JAX_COMPILATION_CACHE_DIR", raising=False)
    monkeypatch.setenv("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    old = tmp_path / "cache" / "vmoe" / "programs" / "other" / "old-cache"
    old.parent.mkdir(parents=True)
    with old.open("wb") as file:
        file.truncate(MOST_PROGRAMS + 1)  # a file of holes
    words = ("predict", "--checkpoint", tiny_run, tmp_path / "a.png")
    assert interpreter(*words).returncode == 0
    (kept,) = {path.parent for path in tmp_path.glob("cache/vmoe/programs/*/*-cache")}
    assert kept != old.parent
    programs = {path.name: path.stat().st_size for path in kept.iterdir()}
    for name, size in programs.items():
        os.truncate(kept / name, size // 2)  # as by a kill or a full disk; JAX would let them be
    result = interpreter(*words)
    assert result.returncode == 0 and "cut off; compiled again" in result.stderr
    assert len(result.stderr.splitlines()) == len(programs)
    again = {path.name: path.stat().st_size for path in kept.iterdir()}
    assert again == pytest.approx(programs, rel=0.01)  # they hold the time that compiling took
    monkeypatch.setenv("XDG_CACHE_HOME", "/proc/none")
    assert interpreter(*words).returncode == 0
