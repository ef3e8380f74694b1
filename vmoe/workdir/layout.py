"""A run folder as files: their names, and what they hold."""

from pathlib import Path

from vmoe.config import TrainConfig, from_json
from vmoe.errors import UsageError


def steps_of(workdir: Path) -> list[int]:
    """The steps of a run folder, oldest first; it is only read: a run may be writing to it."""
    names = [path.name for path in (workdir / "checkpoints").glob("*") if path.is_dir()]
    return sorted(int(name) for name in names if name.isdigit())


def read_class_names(workdir: Path) -> list[str]:
    """The names of the classes that a run folder was made with."""
    return _text(workdir / "classes.txt").splitlines()


def read_config(workdir: Path) -> TrainConfig:
    """The config that a run folder was made with.

    Raises:
        UsageError: there is none, or it is damaged.
    """
    try:
        return from_json(TrainConfig, _text(workdir / "config.json"))
    except UsageError as error:
        raise UsageError(f"{workdir / 'config.json'}: {error}") from None


def _text(path: Path) -> str:
    try:
        return path.read_text()
    except (OSError, UnicodeDecodeError) as error:
        raise UsageError(f"{path}: cannot be read ({error}); a run folder holds it") from None
