"""Turns the doctests of docstrings into code blocks; Markdown would read them as quotations."""

import re
from typing import Any

import griffe

DOCTEST = re.compile(r"((?:^ *>>> .*\n(?:^ *\S.*(?:\n|\Z))*)+)", re.MULTILINE)


class Doctests(griffe.Extension):
    def on_instance(self, *, obj: griffe.Object, **others: Any) -> None:
        """Encloses the doctests of an object's docstring in fences."""
        if obj.docstring:
            obj.docstring.value = DOCTEST.sub(r"```pycon\n\1```\n", f"{obj.docstring.value}\n")
