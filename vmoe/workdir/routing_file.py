"""Reads and writes routing.json, the routing settings that ``vmoe capacity`` chose."""

import json
from pathlib import Path

from vmoe.config import from_json, to_json
from vmoe.config.routing_file import RoutingFile
from vmoe.errors import UsageError, parse_json, writing
from vmoe.host.retry import retried
from vmoe.workdir.layout import replace_text

ROUTING_FILE = "routing.json"
OLDER_NAME = "inference.json"
"""Name of the file in run folders of older versions; a routing.json replaces it."""
FORMAT = 2
"""Version of the format. Format 1 had another name for ``accuracy_uniform``."""


def read_routing_file(path: Path) -> RoutingFile:
    """The content of a routing.json."""
    try:
        return _parsed(retried(path, lambda: path.read_text(encoding="utf-8")))
    except OSError as error:
        raise UsageError(f"{path}: {error.strerror}") from None
    except (UsageError, UnicodeDecodeError) as error:
        raise UsageError(f"{path}: {error}") from None


def _parsed(text: str) -> RoutingFile:
    try:
        fields = parse_json(text)
    except ValueError as error:
        raise UsageError(f"not JSON: {error}") from None
    if not isinstance(fields, dict) or "format" not in fields:
        raise UsageError("not a file of vmoe capacity: it has no format")
    version = fields.pop("format")
    if version == 1:
        fields["accuracy_uniform"] = fields.pop("accuracy_even", None)
    elif version != FORMAT:
        raise UsageError(
            f"format {version!r:.20}, this version of vmoe reads 1 and {FORMAT}; use the version "
            "that wrote it, or run vmoe capacity again"
        )
    return from_json(RoutingFile, json.dumps(fields))


def write_routing_file(path: Path, content: RoutingFile) -> None:
    """Writes a routing.json; a kill leaves either the old or the new content."""
    fields = {"format": FORMAT} | json.loads(to_json(content))
    with writing(path):
        replace_text(path, json.dumps(fields, indent=2) + "\n")
