"""A path to a trained model: this file alone picks the reader."""

from pathlib import Path

from flax import nnx

from vmoe import models
from vmoe.checkpoints.run import Checkpoints, latest_step
from vmoe.config import Train, UsageError, ViTConfig, from_json
from vmoe.nn.vit import ViT


def load(path: str | Path, config: ViTConfig | None = None) -> ViT:
    """A trained model.

    Args:
        path: a run folder, whose newest checkpoint is taken, or one of its ``checkpoints/STEP``.
        config: another config with the same parameters, such as a lower capacity; the one it
            was trained with where none is given.

    Raises:
        UsageError: there is no run or no checkpoint, or the config has other parameters.
    """
    workdir, step = find(path)
    config = config or run_config(workdir).model
    like = nnx.to_pure_dict(nnx.state(models.build_abstract(config), nnx.Param))
    with Checkpoints(workdir) as checkpoints:
        try:
            params = checkpoints.restore(step, params=like)["params"]
        except ValueError as error:
            reason = str(error).splitlines()[0]
            raise UsageError(f"{path}: its parameters do not fit the model: {reason}") from error
    return models.with_params(config, params)


def find(path: str | Path) -> tuple[Path, int]:
    """The run folder and the step that a path names."""
    path = Path(path)
    if path.name.isdigit() and path.parent.name == "checkpoints":
        workdir, step = path.parent.parent, int(path.name)
        if not path.is_dir():
            raise UsageError(f"{path}: no such checkpoint")
        return workdir, step
    if not (path / "config.json").is_file():
        raise UsageError(f"{path}: not a run folder, it has no config.json")
    return path, latest_step(path)


def class_names(path: str | Path) -> list[str]:
    """The names of a trained model's classes, in the order of its logits."""
    return (find(path)[0] / "classes.txt").read_text().splitlines()


def run_config(workdir: Path) -> Train:
    """The config that a run folder was made with."""
    return from_json(Train, (workdir / "config.json").read_text())
