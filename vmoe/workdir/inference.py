"""Reads and writes inference.json, the routing at inference that ``vmoe capacity`` chose."""

import json
from pathlib import Path

from vmoe.config import from_json, to_json
from vmoe.config.inference import Inference
from vmoe.errors import UsageError, parse_json, writing
from vmoe.retry import retried
from vmoe.workdir.layout import replace_text

INFERENCE = "inference.json"
FORMAT = 1
"""Version of its format."""


def read_inference(path: Path) -> Inference:
    """The content of an inference.json.

    Raises:
        UsageError: it is missing, corrupt or of another format version.
        Failure: it cannot be read for a reason that can pass.
    """
    try:
        return _parsed(retried(path, lambda: path.read_text(encoding="utf-8")))
    except OSError as error:
        raise UsageError(f"{path}: {error.strerror}") from None
    except (UsageError, UnicodeDecodeError) as error:
        raise UsageError(f"{path}: {error}") from None


def _parsed(text: str) -> Inference:
    try:
        fields = parse_json(text)
    except ValueError as error:
        raise UsageError(f"not JSON: {error}") from None
    if not isinstance(fields, dict) or "format" not in fields:
        raise UsageError("not a file of vmoe capacity: it has no format")
    if (version := fields.pop("format")) != FORMAT:
        raise UsageError(
            f"format {version!r:.20}, this version of vmoe reads {FORMAT}; use the version that "
            "wrote it, or run vmoe capacity again"
        )
    return from_json(Inference, json.dumps(fields))


def write_inference(path: Path, inference: Inference) -> None:
    """Writes an inference.json; a kill leaves either the old or the new content.

    Raises:
        Failure: it cannot be written.
    """
    fields = {"format": FORMAT} | json.loads(to_json(inference))
    with writing(path):
        replace_text(path, json.dumps(fields, indent=2) + "\n")
