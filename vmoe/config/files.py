"""Reads configs from Python files and JSON, and writes them as JSON."""

import dataclasses
import functools
import json
import re
import runpy
import traceback
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from vmoe.config.experts import ExpertConfig, MlpExpert
from vmoe.config.model import Exchange
from vmoe.config.train import TrainConfig
from vmoe.errors import UsageError, parse_json, require, unknown
from vmoe.fields import Checked, Config, kinds, unknown_field
from vmoe.host.retry import retried
from vmoe.routing import AnyRouter, TokenChoice

FORMAT = 1
"""Version of the format of config.json."""
OF_ROUTERS = (
    *("capacity_factor", "capacity", "capacity_rounding", "capacity_multiple", "dropless"),
    "images_per_group",
)
OF_EXPERTS = {
    "expert_dropout": "dropout",
    "shared_init": "shared_init",
    "implementation": "implementation",
}
OF_EXCHANGE = {
    "transfer_dtype": "dtype",
    "ragged_buffer_factor": "buffer_factor",
    "hot_experts": "hot_experts",
    "transfer_chunks": "chunks",
    "ragged_all_to_all": "ragged",
}
"""Fields of routers, of experts and of the exchange, the latter two by their older name, that older
versions wrote beside them."""
GELUS = {"tanh": "gelu_tanh", "erf": "gelu", "quick": "quick_gelu"}
"""Activations by the names that older versions wrote."""
_PACKAGE = Path(__file__).parents[1]
_NAMED = (_PACKAGE / "configs", _PACKAGE.parent / "configs")  # in a wheel, in a checkout


def load(path: str | Path) -> TrainConfig:
    """The config of a Python file, of a run's config.json, or one that comes with vmoe.

    Args:
        path: a Python file that defines ``config = TrainConfig(...)``, which is executed, so use
            only files that you trust; a JSON file as ``to_json`` writes it; or the name of a file
            of ``configs/``, such as "digits".

    Raises:
        UsageError: the file is missing, raises an error, or defines no such config; names the file
            and, for a Python file, the line.
        Failure: a read fails for a reason that may be temporary.
    """
    path = Path(path).expanduser()
    if not retried(path, path.is_file):
        path = _named(path)
    if path.suffix == ".json":
        try:
            return from_json(TrainConfig, retried(path, path.read_text))
        except (UsageError, UnicodeDecodeError, OSError) as error:
            raise UsageError(f"{path}: {error}") from None
    config = execute(path).get("config")
    if not isinstance(config, TrainConfig):
        raise UsageError(f"{path}: the file must define `config = TrainConfig(...)`")
    return config


def execute(path: Path) -> dict[str, Any]:
    """The names that a Python file defines, by running it, so use only files that you trust.

    Raises:
        UsageError: the file is missing or raises an error.
    """
    try:
        return runpy.run_path(str(path))
    except (Exception, SystemExit) as error:  # any error in such a file is wrong input
        raise UsageError(_recipe_error(path, error)) from error


def _named(path: Path) -> Path:
    """The file of a config that comes with vmoe."""
    found = {file.stem: file for folder in _NAMED for file in sorted(folder.glob("*.py"))}
    if str(path) in found:
        return found[str(path)]
    if path.suffix or path.parent != Path():
        raise UsageError(f"{path}: no such file")
    raise UsageError(unknown("no file and no config", str(path), list(found)))


def _recipe_error(path: Path, error: BaseException) -> str:
    """One line for an error in a Python file: the file, the line and the reason."""
    line = getattr(error, "lineno", None)
    for frame in traceback.extract_tb(error.__traceback__):
        line = frame.lineno if frame.filename == str(path) else line
    reason = _unknown_field(str(error)) or " ".join(str(error).split()) or type(error).__name__
    return f"{path}, line {line}: {reason}" if line else f"{path}: {reason}"


def _unknown_field(message: str) -> str:
    """A message that suggests a field, if Python's message is about an unknown one; else empty."""
    match = re.search(r"(\w+)\.__init__\(\) got an unexpected keyword argument '(\w+)'", message)
    configs = {config.__name__: config for config in _subclasses(Checked)}
    if match is None or match[1] not in configs:
        return ""
    return unknown_field(configs[match[1]], match[2], new=True)


def _subclasses(kind: type) -> list[type]:
    """All direct and indirect subclasses of a class that are dataclasses."""
    subclasses = [
        subclass for direct in kind.__subclasses__() for subclass in (direct, *_subclasses(direct))
    ]
    return [subclass for subclass in subclasses if dataclasses.is_dataclass(subclass)]


def _without_version(fields: Any) -> Any:
    """The fields of a run's config without its format version, which is checked.

    A field that an older version did not write gets the value that matches its behavior.
    """
    if not isinstance(fields, dict) or fields.pop("format", None) != FORMAT:
        raise UsageError(
            f"TrainConfig is not in format {FORMAT}, the one that this version of vmoe reads; use "
            "the version that wrote it"
        )
    probes = fields.get("fewshot")
    if isinstance(probes, dict) and probes.get("data"):  # they had no other way before this field
        probes.setdefault("preprocessing", "paper")
    return fields


def _moved(fields: Any) -> Any:
    """Renames and moves what older versions wrote: GELUs, and settings beside their owner.

    Settings that this kind of router or expert does not have had no effect.
    """
    if isinstance(fields, list):
        return [_moved(each) for each in fields]
    if not isinstance(fields, dict):
        return fields
    fields = {name: _moved(value) for name, value in fields.items()}
    if "gelu" in fields and "activation" not in fields:
        fields["activation"] = fields.pop("gelu")
    own = "patch_size" in fields or str(fields.get("kind")) in kinds(ExpertConfig)
    if own and "activation" in fields:
        older = fields["activation"]
        fields["activation"] = GELUS.get(str(older), older)
    if "num_experts" in fields:
        moved = {name: fields.pop(name) for name in OF_ROUTERS if name in fields}
        router = fields.setdefault("router", {"kind": TokenChoice.kind})
        _give(router, _of_kind(kinds(AnyRouter), router), moved)
        experts = fields.setdefault("experts", {"kind": MlpExpert.kind})
        each = experts.get("each") if isinstance(experts, dict) else None
        moved = {own: fields.pop(name) for name, own in OF_EXPERTS.items() if name in fields}
        for expert in each if isinstance(each, list) else [experts]:
            _give(expert, _of_kind(kinds(ExpertConfig), expert), moved)
        moved = {own: fields.pop(name) for name, own in OF_EXCHANGE.items() if name in fields}
        _give(fields.setdefault("exchange", {}), Exchange, moved)
    return fields


def _of_kind(known: Mapping[str, type], owner: Any) -> type | None:
    """The class of the ``kind`` of a stored router or expert; None if there is none."""
    return known.get(str(owner.get("kind"))) if isinstance(owner, dict) else None


def _give(owner: Any, kind: type | None, moved: dict[str, Any]) -> None:
    """Gives settings to their owner, as far as its class has them; nothing is checked yet."""
    if not isinstance(owner, dict):
        return
    own = {field.name for field in dataclasses.fields(kind)} if kind else {}
    if twice := ", ".join(sorted(moved.keys() & owner.keys())):
        raise UsageError(f"{twice} of model.moe: given in it and beside it, keep one of them")
    owner |= {name: value for name, value in moved.items() if name in own}


def _adapter(kind: type) -> Any:
    """The adapter with which pydantic reads and writes a type."""
    return _adapter_for(kind, tuple(kinds(AnyRouter).values()))


@functools.cache  # making one takes longer than using it
def _adapter_for(kind: type, routers: Sequence[type]) -> Any:
    from pydantic import TypeAdapter

    return TypeAdapter(kind)


def to_json(config: Any) -> str:
    """A config as JSON text, from which ``from_json`` restores it.

    The JSON of a ``TrainConfig`` begins with the version of the format.

    Raises:
        UsageError: a router of yours has no kind of its own, by which it could be read again.
    """
    _check_routers(config)
    fields = _adapter(type(config)).dump_python(config, mode="json")
    version = {"format": FORMAT} if isinstance(config, TrainConfig) else {}
    return json.dumps(version | fields, indent=2)


def _check_routers(config: Any) -> None:
    """Checks that the kind of each router in a config stands for its class."""
    if isinstance(config, tuple):
        for each in config:
            _check_routers(each)
    elif isinstance(config, AnyRouter):
        own, kind = type(config), config.kind
        known = kinds(AnyRouter).get(kind) is own
        problem = f"its class {own.__name__} needs a kind of its own to be in a config"
        require(known, problem, **{"model.moe.router.kind": kind or None})
    elif dataclasses.is_dataclass(config):
        for field in dataclasses.fields(config):
            _check_routers(getattr(config, field.name))


def from_json(kind: type[Config], text: str) -> Config:
    """A config of the given type from the text that ``to_json`` wrote; every field is checked.

    Raises:
        UsageError: the text is not such a config, or has another format version; names the first
            wrong field.
    """
    from pydantic import ValidationError

    try:
        fields = parse_json(text)
    except ValueError as error:
        raise UsageError(f"{kind.__name__} is not JSON: {error}") from None
    if kind is TrainConfig:
        fields = _without_version(fields)
    text = json.dumps(_moved(fields))
    try:
        return _adapter(kind).validate_json(text, strict=True, extra="forbid")
    except ValidationError as error:
        place, problem = _first_problem(error.errors())
        raise UsageError(f"{kind.__name__} {'.'.join(map(str, place))}: {problem}") from None


def _first_problem(errors: Sequence[Any]) -> tuple[Sequence[int | str], str]:
    """The place and the text of the first of pydantic's errors.

    For a field of several types, such as a router, pydantic lists the errors of all of them; those
    of the type whose ``kind`` was given are meant.
    """
    first = errors[0]
    if first["type"] == "union_tag_invalid":
        own = "import the file of yours that defines it, or a later version may have it"
        context = first["ctx"]
        place = (*first["loc"], "kind")
        return place, f"{context['tag']!r} is none of {context['expected_tags']}; {own}"
    if first["loc"][-1:] != ("kind",):
        return first["loc"], first["msg"]
    place = first["loc"][:-2]
    of_field = [error for error in errors if error["loc"][: len(place)] == place]
    others = [error for error in of_field if error["loc"][len(place) + 1 :] == ("kind",)]
    types = {error["loc"][len(place)] for error in others}
    for error in of_field:
        if error["loc"][len(place)] not in types:
            return error["loc"], error["msg"]
    known = ", ".join(error["ctx"]["expected"] for error in others)
    return (*place, "kind"), f"{first['input']!r} is none of {known}; a later version may have it"
