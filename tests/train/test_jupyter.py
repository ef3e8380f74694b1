"""Training in a Jupyter kernel."""

from pathlib import Path

import nbformat
import pytest
from nbclient import NotebookClient

from tests.command import TINY
from vmoe import config as configs
from vmoe.costs.summary import summarize

CODE = """
from vmoe.config import load, replace
from vmoe.train import train

config = replace(load({config!r}), steps=2, log_every=1, optim=dict(warmup_steps=0))
evaluations = train(config, {workdir!r})
"""


@pytest.mark.slow
def test_a_run_prints_plain_lines_and_writes_the_whole_summary(tmp_path: Path) -> None:
    """There, rich shows each line and each table as an output of its own, unless it is told not to,
    and colours text for files."""
    code = CODE.format(config=TINY, workdir=str(tmp_path))
    notebook = nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell(code)])
    NotebookClient(notebook, kernel_name="python3", timeout=300).execute()
    outputs = notebook.cells[0].outputs
    assert {output.output_type for output in outputs} == {"stream"}
    text = "".join(output.text for output in outputs)
    assert "step 1/2  loss" in text and "step 2/2  validation" in text and "\x1b" not in text
    summary = summarize(configs.load(TINY).model, title="model")
    assert (tmp_path / "model.txt").read_text() == summary + "\n"
