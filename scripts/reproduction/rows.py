"""Rows, of which each is the JSON file of a run, and the section of a page that they make."""

import json
import re
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from vmoe.workdir.layout import read_environment, replace_text

Rows = Mapping[str, Mapping[int, dict[str, Any]]]  # by name of the model and seed
VERSIONS = ("commit", "python", "machine", "cores", "jax", "jaxlib", "flax", "numpy")


def versions(workdir: Path) -> dict[str, Any]:
    """What a run was made with."""
    environment = read_environment(workdir)
    return {name: environment[name] for name in VERSIONS}


def read_rows(folder: Path) -> Rows:
    """All rows of a folder."""
    rows: dict[str, dict[int, dict[str, Any]]] = {}
    for path in sorted(folder.glob("*.json")):
        row = json.loads(path.read_text())
        rows.setdefault(row["model"], {})[row["seed"]] = row
    return rows


def check_row(row: Mapping[str, Any], settings: Mapping[str, Any], file: Path) -> None:
    """Checks that a stored row was made with these settings.

    Raises:
        SystemExit: it was not.
    """
    if different := [key for key in settings if row[key] != settings[key]]:
        raise SystemExit(f"{file}: made with other {', '.join(different)}; use other --rows")


def jax_versions(rows: Rows) -> str:
    return ", ".join(
        sorted({f"jax {row['versions']['jax']}" for of in rows.values() for row in of.values()})
    )


def markdown_table(columns: Sequence[str], lines: Iterable[Sequence[str]]) -> str:
    every = [columns, ["---"] * len(columns), *lines]
    return "\n".join(f"| {' | '.join(line)} |" for line in every)


def write_section(page: Path, script: str, section: str) -> None:
    """Replaces what a page has between the markers of a script.

    Raises:
        SystemExit: the page has no markers.
    """
    begin, end = (f"<!-- scripts/{script}: {word} -->" for word in ("begin", "end"))
    text = page.read_text()
    if not re.search(f"{begin}.*{end}", text, re.DOTALL):
        raise SystemExit(f"{page}: no section from {begin} to {end}")
    before, after = text.partition(begin)[0], text.partition(end)[2]
    replace_text(page, f"{before}{begin}\n{section}{end}{after}")
