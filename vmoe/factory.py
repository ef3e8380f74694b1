"""Names and paths to models."""

import sys
from pathlib import Path
from typing import Any

import jax
from flax import nnx

from vmoe import models
from vmoe.checkpoints.run import CorruptCheckpoint, find, restore
from vmoe.config import ViTConfig
from vmoe.errors import Failure, UsageError
from vmoe.nn.vit import ViT
from vmoe.workdir.layout import read_class_names, read_config


def load(path: str | Path, config: ViTConfig | None = None, *, use_ema: bool = True) -> ViT:
    """A trained model; see ``load_step``."""
    return load_step(path, config, use_ema=use_ema)[0]


def load_step(
    path: str | Path, config: ViTConfig | None = None, *, use_ema: bool = True
) -> tuple[ViT, int]:
    """A trained model, and the step of its checkpoint.

    Of a run folder the newest checkpoint is taken whose arrays have their checksums; a line on
    stderr tells of newer ones that have not.

    Args:
        path: a run folder, or one of its ``checkpoints/STEP``, ``checkpoints/best``,
            ``checkpoints/last``.
        config: another config with the same parameters, such as a lower capacity; the one it
            was trained with where none is given.
        use_ema: the moving average of the parameters where the run kept one.

    Raises:
        UsageError: there is no run or no checkpoint, or the config has other parameters.
        Failure: no checkpoint that the path names is good.
    """
    workdir, steps = find(path)
    run = read_config(workdir)
    like = _parameters(run.model)
    if config is not None and config != run.model:
        _check_same(like, _parameters(config), path)
    item = "ema" if use_ema and run.ema_decay else "params"
    for step in reversed(steps):
        try:
            params = restore((workdir / "checkpoints" / str(step)).absolute(), **{item: like})[item]
        except CorruptCheckpoint as damage:
            print(f"{workdir}: checkpoint {step} is damaged ({damage})", file=sys.stderr)
            continue
        return models.with_params(config or run.model, params), step
    raise Failure(f"{path}: no good checkpoint there; the lines above name what is damaged")


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
            hint = "; --image-size resizes the images" if "positions" in name else ""
            raise UsageError(
                f"{path}: {name} is {found} there and {asked} in this model: change only options "
                f"that keep the parameters{hint}"
            )


def class_names(path: str | Path) -> list[str]:
    """The names of a trained model's classes, in the order of its logits."""
    return read_class_names(find(path)[0])
