"""The real command in a real process: what it prints, where, and its exit status."""

import contextlib
import json
import os
import pty
import re
import shutil
import subprocess
import sys
import termios
from pathlib import Path

import pytest
from PIL import Image

from tests.command import ROOT, TINY, interpreter, vmoe
from vmoe.data.sources import open_source


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    workdir = tmp_path_factory.mktemp("cli") / "run"
    done = vmoe("train", "--config", TINY, "--workdir", workdir, "--steps", "60")
    assert done.returncode == 0, done.stderr
    assert "60 steps, validation accuracy" in done.stdout
    assert "step 50/60  loss" in done.stderr
    return workdir


def test_the_live_line_fits_a_terminal_of_80_columns(tmp_path: Path) -> None:
    reader, terminal = pty.openpty()
    termios.tcsetwinsize(terminal, (24, 80))
    words = ["train", "--config", TINY, "--workdir", str(tmp_path / "run"), "--steps", "40"]
    environment = {k: v for k, v in os.environ.items() if k not in ("COLUMNS", "LINES")}
    environment |= {"TERM": "xterm"}
    with subprocess.Popen(
        [sys.executable, "-m", "vmoe", *words, "--log-every", "10"],
        stdin=terminal, stdout=terminal, stderr=terminal, env=environment,
    ) as process:  # fmt: skip
        os.close(terminal)
        output = b""
        with contextlib.suppress(OSError):  # the other end is closed
            while part := os.read(reader, 4096):
                output += part
    os.close(reader)
    assert process.returncode == 0, output.decode()
    lines = [re.sub(r"\x1b\[[0-9;?]*[a-zA-Z]", "", line) for line in output.decode().split("\r")]
    live = [line for line in lines if "loss" in line and "validation" not in line]
    assert live and all(len(line.strip()) <= 80 for line in live)
    found = r"40/40 +\S+ left loss \d\.\d+ acc \S+% lr \S+ dropped \S+% \S+ img/s"
    assert re.search(found, live[-1]), live[-1]


def test_a_run_can_be_run_again_from_its_config_json(run: Path, tmp_path: Path) -> None:
    new = tmp_path / "new"
    done = vmoe("train", "--config", run / "config.json", "--workdir", new)
    assert done.returncode == 0, done.stderr
    assert (new / "config.json").read_text() == (run / "config.json").read_text()


def test_a_batch_of_one_image_trains(tmp_path: Path) -> None:
    words = ("train", "--config", TINY, "--workdir", tmp_path / "run", "--steps", "25")
    done = vmoe(*words, "--batch-size", "1", "--data.mixup", "0")
    assert done.returncode == 0, done.stderr
    assert "25 steps" in done.stdout


def test_a_second_start_resumes_and_reports_it(run: Path) -> None:
    done = vmoe("train", "--config", TINY, "--workdir", run, "--steps=60")
    assert done.returncode == 0 and "resumed from step 60 of 60" in done.stderr


def test_evaluate_takes_the_test_split_and_can_lower_the_capacity(run: Path) -> None:
    done = vmoe("evaluate", "--checkpoint", run)
    assert done.returncode == 0, done.stderr
    assert "digits:test" in done.stdout and "accuracy" in done.stdout
    given = ("--data", "digits:validation", "--json", "--routing.capacity-factor", "0.25")
    found = json.loads(vmoe("evaluate", "--checkpoint", run, *given).stdout)
    assert found["data"] == "digits:validation" and found["images"] == 180
    assert found["dropped"] > 0.5


def test_an_older_checkpoint_is_evaluated_where_the_newest_is_corrupt(
    run: Path, tmp_path: Path
) -> None:
    workdir = tmp_path / "run"
    shutil.copytree(run, workdir)
    shutil.copytree(workdir / "checkpoints" / "60", workdir / "checkpoints" / "70")
    for path in (workdir / "checkpoints" / "70").rglob("d/*"):
        path.write_bytes(path.read_bytes()[:100])
    done = vmoe("evaluate", "--checkpoint", workdir, "--json")
    assert done.returncode == 0 and json.loads(done.stdout)["step"] == 60
    assert done.stderr.startswith(f"{workdir}: checkpoint 70 is corrupt (")


def test_predict_names_the_class_and_the_experts(run: Path, tmp_path: Path) -> None:
    Image.fromarray(open_source("digits", "test").images[0]).save(tmp_path / "digit.png")
    done = vmoe("predict", "--checkpoint", run, tmp_path / "digit.png", "--top", "2")
    assert done.returncode == 0, done.stderr
    assert "digit.png" in done.stdout and "probability" in done.stdout and "block" in done.stdout
    done = vmoe("predict", "--checkpoint", run, tmp_path / "digit.png", "--json")
    assert len(json.loads(done.stdout)[0]["classes"]) == 5


def test_models_and_summary_print_parameters_active_parameters_and_flops() -> None:
    done = interpreter("models", "vmoe_s32_*e8")
    assert "56,999,400" in done.stdout and "GFLOPs" in done.stdout
    found = json.loads(vmoe("models", "vit_tiny", "--json").stdout)
    assert found[0]["parameters"] == found[0]["active_parameters"]
    done = vmoe("summary", "vmoe_15b_every2_e32", "--num-classes", "29593")
    assert "14,705,071,769" in done.stdout, done.stderr


def test_config_prints_the_run_as_json() -> None:
    found = json.loads(interpreter("config", "--config", TINY, "--optim.lr", "0.5").stdout)
    assert found["optim"]["lr"] == 0.5 and found["model"]["moe"]["router"]["kind"]


@pytest.mark.parametrize(
    "command", ["", "train", "evaluate", "predict", "models", "summary", "config", "plan"]
)
def test_every_command_has_help(command: str) -> None:
    done = vmoe(*filter(None, [command]), "--help")
    assert done.returncode == 0 and "vmoe" in done.stdout and not done.stderr


def test_reading_a_run_without_a_checkpoint_leaves_one_that_is_being_written(
    run: Path, tmp_path: Path
) -> None:
    for name in ("config.json", "classes.json"):
        shutil.copy(run / name, tmp_path)
    beside = tmp_path / "checkpoints" / "20.orbax-checkpoint-tmp"
    beside.mkdir(parents=True)
    done = vmoe("evaluate", "--checkpoint", tmp_path)
    assert done.returncode == 2 and done.stderr.count("\n") == 1
    assert "no checkpoint yet" in done.stderr and beside.is_dir()


@pytest.mark.parametrize("words", [["-c", "import vmoe"], ["-m", "vmoe", "--help"]])
def test_starting_imports_neither_jax_nor_flax(words: list[str]) -> None:
    done = subprocess.run(
        [sys.executable, "-X", "importtime", *words], capture_output=True, text=True, cwd=ROOT
    )
    imported = {line.split("|")[-1].strip() for line in done.stderr.splitlines()}
    assert "vmoe" in imported and not imported & {"jax", "flax", "numpy", "pydantic"}
