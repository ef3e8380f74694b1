"""Configs from recipes and JSON, and to JSON."""

import dataclasses
import re
import runpy
import traceback
from pathlib import Path
from typing import Any

from vmoe.config.fields import Config
from vmoe.config.train import TrainConfig
from vmoe.errors import UsageError, unknown


def load(path: str | Path) -> TrainConfig:
    """The ``config`` of a recipe: a Python file that is trusted, and run; or a run's config.json.

    Raises:
        UsageError: there is no such file, or it defines no ``config`` of type TrainConfig.
    """
    path = Path(path)
    if not path.is_file():
        raise UsageError(f"--config {path}: no such file")
    if path.suffix == ".json":
        try:
            return from_json(TrainConfig, path.read_text())
        except (UsageError, UnicodeDecodeError, OSError) as error:
            raise UsageError(f"--config {path}: {error}") from None
    try:
        config = runpy.run_path(str(path)).get("config")
    except (Exception, SystemExit) as error:  # whatever it does wrong, its author gets the line
        line = getattr(error, "lineno", None)
        for frame in traceback.extract_tb(error.__traceback__):
            line = frame.lineno if frame.filename == str(path) else line
        what = _unknown_field(str(error)) or " ".join(str(error).split()) or type(error).__name__
        place = f"--config {path}" + (f", line {line}" if line else "")
        raise UsageError(f"{place}: {what}") from error
    if not isinstance(config, TrainConfig):
        raise UsageError(f"--config {path}: the file must define `config = TrainConfig(...)`")
    return config


def _unknown_field(error: str) -> str:
    """What Python says of a field that a config has not, with the nearest that it has."""
    found = re.search(r"(\w+)\.__init__\(\) got an unexpected keyword argument '(\w+)'", error)
    kind = globals().get(found[1]) if found else None
    if not dataclasses.is_dataclass(kind):
        return ""
    known = [field.name for field in dataclasses.fields(kind)]
    return unknown(f"{found[1]} has no field", found[2], known)


def to_json(config: Any) -> str:
    """Any config as JSON text, enough to build it again."""
    from pydantic import TypeAdapter

    return TypeAdapter(type(config)).dump_json(config, indent=2).decode()


def from_json(kind: type[Config], text: str) -> Config:
    """The config of a given type that ``to_json`` wrote; every field and type is checked.

    Raises:
        UsageError: the text is not such a config; names the first field that is wrong.
    """
    from pydantic import TypeAdapter, ValidationError

    try:
        return TypeAdapter(kind).validate_json(text, strict=True, extra="forbid")
    except ValidationError as error:
        first = error.errors()[0]
        place = ".".join(str(part) for part in first["loc"])
        raise UsageError(f"{kind.__name__} {place}: {first['msg']}") from None
