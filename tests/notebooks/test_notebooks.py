"""Notebooks run top to bottom, and are stored with the outputs of the cells that they have."""

import contextlib
import dataclasses
import functools
import io
import json
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jupytext
import matplotlib.pyplot as plt
import nbformat
import pytest

import vmoe
from scripts import run_notebooks
from vmoe import models
from vmoe.config import TrainConfig, from_json, replace
from vmoe.costs.summary import summarize

ROOT = Path(__file__).parents[2]
SCRIPT = ROOT / "scripts" / "run_notebooks.py"
SMALL = {
    "01_predict": {"data": "digits", "count": 32, "image_sizes": [12]},
    "02_routing": {"data": "digits", "images": 16, "page_images": 8},
    "03_finetune": {"steps": 4},
    "04_train": {"steps": 3, "own_steps": 2, "depth": 1},
}
"""Parameters by notebook with which it runs in seconds, beside its model."""
NAMES = sorted(path.stem for path in (ROOT / "notebooks").glob("*.py"))


def run(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, SCRIPT, *arguments], capture_output=True, text=True)


def saved_dense(run: Path, folder: Path) -> Path:
    """A folder with a new dense model of two blocks, for the data of a run."""
    loaded = vmoe.load(run)
    config = replace(loaded.model.config, depth=2, sparse_blocks=())
    dataclasses.replace(loaded, model=models.build(config)).save(folder)
    return folder


def code_cells(notebook: nbformat.NotebookNode) -> list[nbformat.NotebookNode]:
    return [cell for cell in notebook.cells if cell.cell_type == "code"]


@pytest.fixture(scope="module")
def executed(
    tiny_run: Path, tmp_path_factory: pytest.TempPathFactory
) -> Callable[[str], tuple[list[nbformat.NotebookNode], Path]]:
    """By name, runs a notebook once: the code cells with their outputs, and the folder of runs."""

    @functools.cache
    def cells_of(name: str) -> tuple[list[nbformat.NotebookNode], Path]:
        folder = tmp_path_factory.mktemp(name)
        settings = dict(SMALL[name])
        if name in ("01_predict", "02_routing"):
            settings["checkpoint"] = str(tiny_run)
        else:
            settings["folder"] = str(folder / "runs")
        if name == "03_finetune":
            settings["parent"] = str(saved_dense(tiny_run, folder / "dense"))
        options = [f"--set={name}={json.dumps(value)}" for name, value in settings.items()]
        result = run(name, *options, "--out", str(folder))
        assert result.returncode == 0, result.stderr
        return code_cells(nbformat.read(folder / f"{name}.ipynb", 4)), folder / "runs"

    return cells_of


@pytest.mark.parametrize(
    "name",
    [pytest.param(name, marks=[pytest.mark.slow] * (name != "02_routing")) for name in NAMES],
)
def test_a_notebook_runs_top_to_bottom(
    name: str, executed: Callable[[str], tuple[list[nbformat.NotebookNode], Path]]
) -> None:
    cells, _ = executed(name)
    assert [cell.execution_count for cell in cells] == [*range(1, len(cells) + 1)]
    outputs = [output.get("data", {}) for cell in cells for output in cell.outputs]
    assert any("image/png" in output for output in outputs)
    embedded = any("srcdoc=" in output.get("text/html", "") for output in outputs)
    assert embedded == (name == "02_routing")


@pytest.mark.slow
def test_training_in_a_notebook_prints_plain_lines_and_writes_the_whole_summary(
    executed: Callable[[str], tuple[list[nbformat.NotebookNode], Path]],
) -> None:
    """There, rich shows each line and each table as an output of its own, unless it is told not to,
    and colors text for files."""
    cells, folder = executed("04_train")
    (training,) = [cell for cell in cells if "\nevaluations = train(" in cell.source]
    assert {output.output_type for output in training.outputs} == {"stream"}
    text = "".join(output.text for output in training.outputs)
    assert "step 1/3  loss" in text and "step 3/3  validation" in text and "\x1b" not in text
    model = from_json(TrainConfig, (folder / "digits" / "config.json").read_text()).model
    summary = (folder / "digits" / "model.txt").read_text()
    assert summary == summarize(model, title="model") + "\n"


@pytest.mark.parametrize("name", NAMES)
def test_a_notebook_is_stored_with_the_outputs_of_its_cells(name: str) -> None:
    """In order, without errors or warnings, and without paths of the machine that ran it.

    Training prints its progress on stderr.
    """
    path = ROOT / "notebooks" / f"{name}.ipynb"
    ours, stored = jupytext.read(path.with_suffix(".py")), nbformat.read(path, 4)
    cells = [[(cell.cell_type, cell.source) for cell in each.cells] for each in (ours, stored)]
    again = f"run: python scripts/run_notebooks.py {name}"
    assert cells[0] == cells[1], again
    assert stored.metadata["vmoe"]["sha256"] == run_notebooks.digest(stored), again
    code = code_cells(stored)
    assert [cell.execution_count for cell in code] == [*range(1, len(code) + 1)]
    outputs = [output for cell in code for output in cell.outputs]
    assert not any(output.output_type == "error" for output in outputs)
    written = "".join(
        str(output.get("text") or output.data.get("text/plain")) for output in outputs
    )
    assert "Warning" not in written
    assert not re.search(r"/(tmp|root|home|work)\b", written)


@pytest.mark.slow
@pytest.mark.parametrize("name", NAMES)
def test_the_cells_of_a_notebook_print_today_what_is_stored(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Up to the first cell tagged "long"; other machines may round numbers differently."""
    monkeypatch.chdir(tmp_path)
    plt.switch_backend("agg")
    names: dict[str, Any] = {}
    compared = 0
    for cell in code_cells(nbformat.read(ROOT / "notebooks" / f"{name}.ipynb", 4)):
        if "long" in cell.metadata.get("tags", []):
            break
        with contextlib.redirect_stdout(io.StringIO()) as printed:
            exec(cell.source.replace("%matplotlib inline", ""), names)  # the cells are ours
        stored = "".join(out.text for out in cell.outputs if out.get("name") == "stdout")
        words, numbers = parts(printed.getvalue())
        stored_words, stored_numbers = parts(stored)
        assert words == stored_words
        assert numbers == pytest.approx(stored_numbers, rel=0.02, abs=0.8)
        compared += bool(stored)
    plt.close("all")
    assert compared


def parts(text: str) -> tuple[str, list[float]]:
    """A text without its numbers, and the numbers."""
    number = r"\d[\d,]*(?:\.\d+)?(?:e[-+]\d+)?"
    found = [float(each.replace(",", "")) for each in re.findall(number, text)]
    return re.sub(rf" *{number}", "#", text), found


def test_a_missing_folder_for_the_notebooks_is_made(tmp_path: Path) -> None:
    path = tmp_path / "notebooks" / "one.py"
    path.parent.mkdir()
    path.write_text("# %%\nprint(1 + 1)\n")
    run_notebooks.run(path, [], tmp_path / "out" / "of" / "notebooks")
    stored = nbformat.read(tmp_path / "out" / "of" / "notebooks" / "one.ipynb", 4)
    assert stored.cells[0].outputs[0].text == "2\n"
    assert stored.metadata["vmoe"]["sha256"] == run_notebooks.digest(stored)
    stored.cells[0].outputs[0].text = "3\n"
    assert stored.metadata["vmoe"]["sha256"] != run_notebooks.digest(stored)


def test_a_failing_cell_or_a_wrong_setting_writes_nothing(tmp_path: Path) -> None:
    out = ("--out", str(tmp_path))
    result = run("02_routing", "--set", "pictures=1", *out)
    assert result.returncode == 1 and "the parameters cell sets no such name" in result.stderr
    result = run("02_routing", "--set", 'checkpoint="nowhere"', *out)
    assert result.returncode == 1 and "nowhere: no such" in result.stderr
    result = run("2_routing", *out)
    assert (
        result.returncode == 1 and "use one of" in result.stderr and "02_routing" in result.stderr
    )
    assert not list(tmp_path.iterdir())
