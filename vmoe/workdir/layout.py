"""The files of a run folder.

config.json        the config, to repeat the run      model.txt     summary of the model
environment.json   versions, devices, commit, data    classes.json  class names, in label order
init.json          where the first parameters are from, if not from the seed
config.N.json      the config before the run was extended from N steps
changes.txt        a line per field of the config that was changed, with the time and the step
change.json        what such a change writes to other files, until it is done
metrics.csv        a row per report                   checkpoints/  STEP/ ...
evaluations.csv    a row per evaluation               experts.csv   a row per expert
fewshot.csv        a row per few-shot probe           evaluated.json  ends of the CSV files
tensorboard/       the same, for TensorBoard, and pictures
wandb.json, wandb/ the same, for Weights & Biases, if requested: the id of its run, and its files
profile/           traces of steps, if requested
routing.json       the routing settings chosen by vmoe capacity, if it was run (routing_file.py)
console.txt        when and why messages could no longer be printed, if that happened
unreadable.txt     training images that could not be read, with the reasons, if there were any
left_out.txt       the same of the evaluation sets

Functions that read a file raise a UsageError if it is missing or corrupt, and a Failure if it
cannot be read for a temporary reason. Functions that write one raise an OSError.
"""

import contextlib
import errno
import json
import os
import re
import time
from collections.abc import Collection, Iterator, Sequence
from pathlib import Path
from typing import Any

from vmoe.config import TrainConfig
from vmoe.config.files import load, to_json
from vmoe.errors import UsageError, parse_json
from vmoe.host.cache import atomic
from vmoe.host.retry import failure, retried

CONFIG = "config.json"
ENVIRONMENT = "environment.json"
CLASSES = "classes.json"
MODEL = "model.txt"
INIT = "init.json"
INIT_KEYS = {"path", "new_head", "partial", "step", "checksum", "weights"}
CHANGES, CHANGE = "changes.txt", "change.json"
CHECKPOINTS = "checkpoints"
CONSOLE = "console.txt"
UNREADABLE, LEFT_OUT = "unreadable.txt", "left_out.txt"
EVALUATED = "evaluated.json"  # the end of each CSV file after the newest evaluation
TABLES = ("metrics.csv", "experts.csv", "fewshot.csv", "evaluations.csv")  # in the order of writing
OF_ONE_RUN = (
    *(*TABLES, f"{CHECKPOINTS}/metrics.json", "wandb.json", EVALUATED, UNREADABLE, LEFT_OUT),
    *(CHANGES, CONFIG, ENVIRONMENT, CLASSES, MODEL, INIT),
)
"""Files that are renamed for another run, in this order: a kill leaves a folder with the run of
before if ``CONFIG`` is there, and otherwise a new one, whose metadata replace those that are left.
"""


def has_config(workdir: Path) -> bool:
    """Whether the folder holds a run; config.json is written last of its metadata."""
    return retried(workdir, (workdir / CONFIG).is_file)


def write_metadata(
    workdir: Path,
    config: TrainConfig,
    class_names: tuple[str, ...],
    *,
    environment: dict[str, Any],
    model: str,
    init: dict[str, Any] | None,
) -> None:
    """Writes the metadata of a run: its config, class names, environment and model summary."""
    texts = {
        ENVIRONMENT: json.dumps(environment, indent=2),
        MODEL: model,
        CLASSES: json.dumps(class_names, indent=0),
        **({INIT: json.dumps(init, indent=2)} if init else {}),
        CONFIG: to_json(config),  # last, so a folder that has it is complete
    }
    (workdir / INIT).unlink(missing_ok=True)  # left by a run that was killed before it had a config
    for name, text in texts.items():
        replace_text(workdir / name, text + "\n")


def replace_text(path: Path, text: str) -> None:
    """Replaces a text file; newlines are written unchanged. See ``replacing``."""
    with replacing(path) as temporary:
        temporary.write_text(text, encoding="utf-8", newline="")


@contextlib.contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """As ``atomic``, but an OSError in the context, such as of a full disk, has the file's path."""
    try:
        with atomic(path) as temporary:
            yield temporary
    except OSError as error:  # the error of a full disk has no path
        error.filename = str(path)
        raise


def append_bytes(path: Path, content: bytes) -> None:
    """Appends all of the content to a file, or nothing."""
    with path.open("ab", buffering=0) as file:
        size = file.tell()
        try:
            if file.write(content) < len(content):
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        except OSError:
            with contextlib.suppress(OSError):  # the first error has the reason
                file.truncate(size)
            raise


def read_config(workdir: Path) -> TrainConfig:
    """The config of a run folder."""
    return load(workdir / CONFIG)


def read_class_names(workdir: Path) -> list[str]:
    """The class names of a run folder, in the order of the logits."""
    names = _read_json(workdir / CLASSES)
    if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
        raise UsageError(f"{workdir / CLASSES}: expected a JSON list of class names")
    return names


def read_environment(workdir: Path) -> dict[str, Any]:
    """Versions, devices and data at the start of a run."""
    return _read_object(workdir / ENVIRONMENT)


def steps_of(workdir: Path, folder: str = CHECKPOINTS) -> list[int]:
    """The checkpointed steps of a run folder, ascending; safe while a run writes to it."""
    path = workdir / folder

    def steps() -> list[int]:
        with os.scandir(path) as entries:
            return [int(each.name) for each in entries if each.name.isdigit() and each.is_dir()]

    try:
        return sorted(retried(path, steps))
    except (FileNotFoundError, NotADirectoryError) as error:
        if path.is_symlink() or path.exists():  # a link to nothing, or a file
            raise failure(path, error) from None
        return []


def files_of_a_run(workdir: Path) -> list[str]:
    """The results of a run that a folder holds: its CSV files, and checkpoints if there are any."""
    tables = [name for name in TABLES if (workdir / name).exists()]
    return [CHECKPOINTS, *tables] if steps_of(workdir) else tables


def read_init(workdir: Path) -> dict[str, Any] | None:
    """Where the first parameters of a run come from; None if they are random."""
    if not retried(workdir, (workdir / INIT).exists):
        return None
    return _read_object(workdir / INIT, INIT_KEYS)


def extend(workdir: Path, config: TrainConfig) -> None:
    """Replaces the config by one with more steps, and keeps the old one in the same folder."""
    stored = read_config(workdir)
    if stored.total_steps < config.total_steps:
        replace_text(workdir / f"config.{stored.steps}.json", to_json(stored) + "\n")
        replace_text(workdir / CONFIG, to_json(config) + "\n")


def change(
    workdir: Path, config: TrainConfig, environment: dict[str, Any], lines: Sequence[str]
) -> None:
    """Replaces the config by one in which fields differ that may change, with a line for each.

    After a kill, ``finish_change`` writes the rest, so that each line is written once.
    """
    path, steps = workdir / CHANGES, steps_of(workdir)
    before = path.read_text(encoding="utf-8", errors="replace") if path.exists() else ""
    stamp = f"{time.strftime('%Y-%m-%dT%H:%M:%S%z')} step {steps[-1] if steps else 0}"
    texts = {
        CHANGES: before + "".join(f"{stamp}: {line}\n" for line in lines),
        ENVIRONMENT: json.dumps(environment, indent=2) + "\n",
        CONFIG: to_json(config) + "\n",
    }
    replace_text(workdir / CHANGE, json.dumps(texts))
    finish_change(workdir)


def finish_change(workdir: Path) -> None:
    """Writes what a change has to write, if it was killed before it had."""
    path = workdir / CHANGE
    if retried(path, path.exists):
        texts = _read_object(path)
        for name in (CHANGES, ENVIRONMENT, CONFIG):
            replace_text(workdir / name, texts[name])
        path.unlink()


def interval_changed_at(workdir: Path) -> int:
    """The step at which the interval between checkpoints was last changed; 0 if it was not.

    Checkpoints up to this step are scheduled by another interval.
    """
    path = workdir / CHANGES
    try:
        text = retried(path, lambda: path.read_text(encoding="utf-8", errors="replace"))
    except FileNotFoundError:
        return 0
    except OSError as error:
        raise failure(path, error) from None
    steps = re.findall(r"^\S+ step (\d+): checkpoint_every ", text, re.MULTILINE)
    return int(steps[-1]) if steps else 0


def set_aside(path: Path) -> str:
    """Renames a file to .old, or to .old.2 and so on: no file is replaced.

    Returns:
        the new name; empty if there is no file, or it is empty.
    """
    if not path.exists() or not path.stat().st_size:
        return ""
    old, number = path.with_name(f"{path.name}.old"), 1
    while old.exists():
        number += 1
        old = path.with_name(f"{path.name}.old.{number}")
    path.rename(old)
    return old.name


def _read_object(path: Path, keys: Collection[str] = ()) -> dict[str, Any]:
    """A JSON object, which has at least these keys."""
    content = _read_json(path)
    if not isinstance(content, dict) or not content.keys() >= set(keys):
        problem = f"{path}: corrupt; restore it, or use another workdir"
        raise UsageError(problem).remedied_by(workdir=None)
    return content


def _read_json(path: Path) -> Any:
    try:
        return parse_json(retried(path, lambda: path.read_text(encoding="utf-8")))
    except FileNotFoundError:
        message = f"{path.name} is missing from run folder {path.parent}; restore it"
        raise UsageError(message) from None
    except (OSError, ValueError) as error:
        raise UsageError(f"{path}: cannot be read ({error}); every run folder needs it") from None
