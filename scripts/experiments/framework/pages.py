"""The pages of docs/results in Markdown: answers, tables, and how their figures were measured."""

import re
import textwrap
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from scripts.experiments.framework.runs import Rows
from vmoe.workdir.layout import replace_text

NOT_MEASURED = "Not measured yet."
COLUMNS = 100  # of a page
Answer = tuple[str, str]
"""A part of an answer, and its numbers."""
Tables = Mapping[str, tuple[str, Callable[[Rows], str]]]
"""The tables of a page by the name of their section, with a title."""


def figures_of(rows: Rows, name: str) -> list[Any]:
    """The figures of a model or a part by seed; empty if it was not measured."""
    return [row["figures"] for _, row in sorted(rows.get(name, {}).items())]


def wrapped(text: str, indent: str = "") -> str:
    """A paragraph of a page; with an indent for all lines but the first."""
    text = " ".join(text.split())
    return textwrap.fill(text, COLUMNS, subsequent_indent=indent, break_on_hyphens=False)


def answer(texts: Iterable[str], numbers: Iterable[str]) -> str:
    """The paragraphs that the page of answers repeats."""
    fields = {"Answer": capitalized("; ".join(texts)), "Numbers": "; ".join(numbers)}
    return "\n\n".join(wrapped(f"**{word}:** {text.rstrip('.')}.") for word, text in fields.items())


def answer_of(parts: Iterable[Answer | None]) -> str:
    """As for ``answer``, of its measured parts; None are those that were not measured."""
    texts, numbers = zip(*([each for each in parts if each] or [(NOT_MEASURED,) * 2]), strict=True)
    return answer(texts, [capitalized(numbers[0]), *numbers[1:]])


def capitalized(text: str) -> str:
    return text[:1].upper() + text[1:]


def percents(values: Iterable[float]) -> tuple[str, str]:
    """Percentages, one for each seed, and their mean."""
    values = list(values)
    return ", ".join(f"{value:.2f}" for value in values), f"{np.mean(values):.2f}"


def markdown_table(columns: Sequence[str], lines: Iterable[Sequence[str]]) -> str:
    """A table; without lines, what says so."""
    every = [columns, ["---"] * len(columns), *lines]
    return "\n".join(f"| {' | '.join(line)} |" for line in every) if every[2:] else NOT_MEASURED


def sections_of(name: str, tables: Tables, rows: Rows, answer: str, machine: str) -> dict[str, str]:
    """The generated sections of the page of an experiment by name.

    Args:
        name: of the experiment.
        machine: where and when the rows were made.
    """
    sections = {section: table(rows) for section, (_, table) in tables.items()}
    return sections | {"answer": answer, "how": how_measured(name, rows, machine)}


def how_measured(name: str, rows: Rows, machine: str) -> str:
    """The command, machine, hours and versions of all rows, and the checksums of their data."""
    every = [row for of in rows.values() for row in of.values()]
    if not every:
        return NOT_MEASURED
    versions = {f"{name} {value}" for row in every for name, value in row["versions"].items()}
    hours = sum(row["seconds"] for row in every) / 3600
    text = wrapped(
        f"""`python -m scripts.experiments {name}`, {machine}, {hours:.2g} hours of one core in all;
        {", ".join(sorted(versions))}."""
    )
    data = {name: value for row in every for name, value in row["data"].items()}
    lines = [[name, f"`{value}`"] for name, value in sorted(data.items())]
    return f"{text}\n\n{markdown_table(['data', 'SHA-256'], lines)}" if lines else text


def jax_versions(rows: Rows) -> str:
    every = {f"jax {row['versions']['jax']}" for of in rows.values() for row in of.values()}
    return ", ".join(sorted(every))


def write_sections(page: Path, sections: Mapping[str, str]) -> None:
    """Replaces the text between the markers of each named section of a page.

    Raises:
        SystemExit: the page has no such markers.
    """
    text = page.read_text()
    for name, section in sections.items():
        begin, end = (f"<!-- {name}: {word} -->" for word in ("begin", "end"))
        if not re.search(f"{begin}.*{end}", text, re.DOTALL):
            raise SystemExit(f"{page}: no section from {begin} to {end}")
        before, after = text.partition(begin)[0], text.partition(end)[2]
        text = f"{before}{begin}\n\n{section.strip()}\n\n{end}{after}"
    replace_text(page, text)
