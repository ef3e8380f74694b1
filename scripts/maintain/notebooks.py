"""Runs notebooks top to bottom, and writes them as .ipynb files with their outputs.

    python -m scripts.maintain.notebooks                  # runs all of notebooks/*.py
    python -m scripts.maintain.notebooks 02_routing --set images=32 --out FOLDER

A notebook is a Python file whose cells start with ``# %%`` (py:percent). The .ipynb next to it has
the same cells, and a hash of its code cells and their outputs, so that a test finds a file that was
edited instead of run. ``--set`` adds a cell after the cell tagged "parameters". A notebook runs in
a temporary folder, which is deleted afterwards. If a cell fails, nothing is written and the exit
status is 1. A notebook whose data are not installed raises ``SystemExit`` with the line that
installs them. It is skipped with exit status 0 if all notebooks are run; if it was named, the exit
status is 2. Cells tagged "photographs" are written without their outputs, which show photographs
that must not be distributed with the project.

The slow tests run the cells before the first cell tagged "long" again, and compare what they print
with the stored outputs.
"""

import argparse
import hashlib
import json
import sys
import tempfile
import time
from pathlib import Path

import jupytext
import nbformat
from nbclient import NotebookClient
from nbclient.exceptions import CellExecutionError
from traitlets.config import Config

from vmoe.workdir.layout import replace_text

NOTEBOOKS = Path(__file__).parents[2] / "notebooks"
KERNEL = {"name": "python3", "display_name": "Python 3", "language": "python"}
METADATA = {"kernelspec": KERNEL, "language_info": {"name": "python"}}


def read(path: Path) -> nbformat.NotebookNode:
    """The notebook of a py:percent file, with cell ids that do not change from run to run."""
    notebook = jupytext.read(path, fmt="py:percent")
    notebook.metadata = nbformat.from_dict(METADATA)
    for i, cell in enumerate(notebook.cells):
        cell.id = f"cell-{i}"
    return notebook


def digest(notebook: nbformat.NotebookNode) -> str:
    """A hash of the code cells and their outputs."""
    cells = [(cell.source, cell.outputs) for cell in notebook.cells if cell.cell_type == "code"]
    return hashlib.sha256(json.dumps(cells, sort_keys=True).encode()).hexdigest()


def with_parameters(notebook: nbformat.NotebookNode, settings: list[str]) -> None:
    """Adds a cell that sets names to JSON values after the cell tagged "parameters".

    Raises:
        ValueError: there is no such cell, or it does not set such a name.
    """
    tagged = [
        i for i, cell in enumerate(notebook.cells) if "parameters" in cell.metadata.get("tags", [])
    ]
    if not tagged:
        raise ValueError('no cell is tagged "parameters"')
    lines = []
    for setting in settings:
        name, _, value = setting.partition("=")
        if f"\n{name} = " not in f"\n{notebook.cells[tagged[0]].source}":
            raise ValueError(f"--set {name}: the parameters cell sets no such name")
        lines.append(f"{name} = {json.loads(value)!r}")
    notebook.cells.insert(tagged[0] + 1, nbformat.v4.new_code_cell("\n".join(lines)))


def run(path: Path, settings: list[str], out: Path) -> None:
    """Executes a notebook and writes it to a folder.

    Raises:
        CellExecutionError: a cell fails.
        SystemExit: a cell raises it; the message is that of the cell.
        ValueError: as for ``with_parameters``.
    """
    notebook = read(path)
    if settings:
        with_parameters(notebook, settings)
    with tempfile.TemporaryDirectory() as folder:
        client = NotebookClient(
            notebook,
            timeout=None,
            record_timing=False,
            coalesce_streams=True,  # lines that follow each other are one output
            resources={"metadata": {"path": folder}},
            config=Config(KernelManager={"transport_encryption": "auto"}),
        )
        try:
            client.execute()
        except CellExecutionError as error:
            if error.ename != "SystemExit":
                raise
            raise SystemExit(error.evalue) from None
    for cell in notebook.cells:
        if "photographs" in cell.metadata.get("tags", []):
            cell.outputs = []
    hashed = {"vmoe": {"sha256": digest(notebook)}}
    notebook.metadata = nbformat.from_dict(METADATA | hashed)  # without the version of this Python
    out.mkdir(parents=True, exist_ok=True)
    replace_text(out / f"{path.stem}.ipynb", nbformat.writes(notebook) + "\n")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("names", nargs="*", help="without suffix; all if none")
    parser.add_argument("--set", action="append", default=[], metavar="NAME=JSON", dest="settings")
    parser.add_argument("--out", type=Path, default=NOTEBOOKS, help="folder of the .ipynb files")
    options = parser.parse_args()
    known = {path.stem: path for path in sorted(NOTEBOOKS.glob("*.py"))}
    for name in options.names or known:
        if name not in known:
            sys.exit(f"no notebook {name!r}: use one of {', '.join(known)}")
        start = time.perf_counter()
        try:
            run(known[name], options.settings, options.out)
        except (CellExecutionError, ValueError) as error:
            sys.exit(f"{name}: {error}")
        except SystemExit as reason:
            if options.names:
                parser.exit(2, f"{name}: {reason}\n")
            print(f"{name}: skipped: {reason}", flush=True)
            continue
        print(f"{name}: {time.perf_counter() - start:.0f} s", flush=True)


if __name__ == "__main__":
    main()
