"""The files of a run folder.

config.json        the config, to repeat the run      model.txt     summary of the model
environment.json   versions, devices, commit, data    classes.json  class names, in label order
metrics.csv        a row per report                   checkpoints/  STEP/ ...
evaluations.csv    a row per evaluation               experts.csv   a row per expert
tensorboard/       the same, for TensorBoard
"""

import dataclasses
import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from vmoe.config import TrainConfig
from vmoe.config.files import load, to_json
from vmoe.errors import UsageError

CONFIG = "config.json"
ENVIRONMENT = "environment.json"
CLASSES = "classes.json"
MODEL = "model.txt"
CHECKPOINTS = "checkpoints"


def has_config(workdir: Path) -> bool:
    """Whether the folder holds a run: of its metadata, config.json is written last."""
    return (workdir / CONFIG).is_file()


def write_metadata(
    workdir: Path,
    config: TrainConfig,
    class_names: tuple[str, ...],
    *,
    environment: dict[str, Any],
    model: str,
) -> None:
    """Writes the metadata of a run: its config, class names, environment and model summary.

    Raises:
        OSError: the folder cannot be written.
    """
    texts = {
        ENVIRONMENT: json.dumps(environment, indent=2),
        MODEL: model,
        CLASSES: json.dumps(class_names, indent=0),
        CONFIG: to_json(config),  # last, so a folder that has it is complete
    }
    for name, text in texts.items():
        replace_text(workdir / name, text + "\n")


def replace_text(path: Path, text: str) -> None:
    """Writes a temporary file and renames it: a kill leaves either the old or the new content.

    Newlines are written unchanged.

    Raises:
        OSError: the folder cannot be written.
    """
    temporary = path.with_name(f"{path.name}.tmp")
    temporary.write_text(text, newline="")
    os.replace(temporary, path)


def read_config(workdir: Path) -> TrainConfig:
    """The config of a run folder.

    Raises:
        UsageError: the file is missing, corrupt, or of another format version.
    """
    return load(workdir / CONFIG)


def read_class_names(workdir: Path) -> list[str]:
    """The class names of a run folder, in the order of the logits.

    Raises:
        UsageError: the file is missing or corrupt.
    """
    names = _read_json(workdir / CLASSES)
    if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
        raise UsageError(f"{workdir / CLASSES}: expected a JSON list of class names")
    return names


def read_environment(workdir: Path) -> dict[str, Any]:
    """Versions, devices and data at the start of a run.

    Raises:
        UsageError: the file is missing or corrupt.
    """
    return _read_json(workdir / ENVIRONMENT)


def steps_of(workdir: Path) -> list[int]:
    """The checkpointed steps of a run folder, ascending; safe while a run writes to it."""
    names = [path.name for path in (workdir / CHECKPOINTS).glob("*") if path.is_dir()]
    return sorted(int(name) for name in names if name.isdigit())


def check_same_run(workdir: Path, config: TrainConfig, class_names: tuple[str, ...]) -> None:
    """Checks that a folder holds a run of the same config and classes.

    Raises:
        UsageError: names every field that differs.
    """
    if differences := list(_differences(read_config(workdir), config)):
        raise UsageError(
            f"workdir {workdir} holds a run of another config ({'; '.join(differences)}): use "
            "another workdir, or the config of that run"
        )
    if tuple(read_class_names(workdir)) != class_names:
        raise UsageError(
            f"workdir {workdir}: the classes of the training data differ from those of the run "
            f"({workdir / CLASSES}): use another workdir"
        )


def _differences(stored: Any, current: Any, place: str = "") -> Iterator[str]:
    """A phrase for each field that differs between two configs."""
    if dataclasses.is_dataclass(stored) and type(stored) is type(current):
        names = [field.name for field in dataclasses.fields(stored)]
        pairs = {name: (getattr(stored, name), getattr(current, name)) for name in names}
    elif isinstance(stored, tuple) and isinstance(current, tuple) and len(stored) == len(current):
        pairs = {str(i): pair for i, pair in enumerate(zip(stored, current, strict=True))}
    else:
        if stored != current:
            yield f"{place} is {stored} there and {current} here"
        return
    for name, pair in pairs.items():
        yield from _differences(*pair, f"{place}.{name}".lstrip("."))


def _read_json(path: Path) -> Any:
    try:
        return json.loads(path.read_text())
    except (OSError, ValueError) as error:
        raise UsageError(f"{path}: cannot be read ({error}); every run folder needs it") from None
