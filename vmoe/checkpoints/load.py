"""A path to a trained model: this file alone picks the reader."""

from pathlib import Path
from typing import Any

import jax
from flax import nnx

from vmoe import models
from vmoe.checkpoints.run import latest_step, read_params
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
    trained = run_config(workdir).model
    like = _parameters(trained)
    if config is not None and config != trained:
        _check_same(like, _parameters(config), path)
    return models.with_params(config or trained, read_params(workdir, step, like))


def _parameters(config: ViTConfig) -> dict[str, Any]:
    return nnx.to_pure_dict(nnx.state(models.build_abstract(config), nnx.Param))


def _check_same(stored: dict[str, Any], wanted: dict[str, Any], path: str | Path) -> None:
    """Refuses a config whose parameters are not those of the checkpoint, naming the first."""
    shapes = [
        {jax.tree_util.keystr(name, simple=True, separator="/"): leaf.shape for name, leaf in flat}
        for flat in map(jax.tree.leaves_with_path, (stored, wanted))
    ]
    for name in sorted({**shapes[0], **shapes[1]}):
        found, asked = (shape.get(name, "missing") for shape in shapes)
        if found != asked:
            raise UsageError(
                f"{path}: {name} is {found} there and {asked} in this model: change only options "
                "that keep the parameters"
            )


def find(path: str | Path) -> tuple[Path, int]:
    """The run folder and the step that a path names."""
    path = workdir = Path(path)
    if is_step := path.name.isdigit() and path.parent.name == "checkpoints":
        workdir = path.parent.parent
    if not (workdir / "config.json").is_file():
        raise UsageError(f"{workdir}: not a run folder, it has no config.json")
    if is_step and not path.is_dir():
        raise UsageError(f"{path}: no such checkpoint")
    return workdir, int(path.name) if is_step else latest_step(workdir)


def class_names(path: str | Path) -> list[str]:
    """The names of a trained model's classes, in the order of its logits."""
    return (find(path)[0] / "classes.txt").read_text().splitlines()


def run_config(workdir: Path) -> Train:
    """The config that a run folder was made with."""
    return from_json(Train, (workdir / "config.json").read_text())
