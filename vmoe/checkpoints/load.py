"""A path to a trained model: this file alone picks the reader."""

import sys
from pathlib import Path
from typing import Any

import jax
from flax import nnx

from vmoe import models
from vmoe.checkpoints.run import Damaged, best_of, read, steps_of
from vmoe.config import Train, ViTConfig, from_json
from vmoe.errors import Failure, UsageError
from vmoe.nn.vit import ViT


def load(path: str | Path, config: ViTConfig | None = None, *, averaged: bool = True) -> ViT:
    """A trained model; see ``load_step``."""
    return load_step(path, config, averaged=averaged)[0]


def load_step(
    path: str | Path, config: ViTConfig | None = None, *, averaged: bool = True
) -> tuple[ViT, int]:
    """A trained model, and the step of its checkpoint.

    Of a run folder the newest checkpoint is taken whose arrays have their checksums; a line on
    stderr tells of newer ones that have not.

    Args:
        path: a run folder, or one of its ``checkpoints/STEP``, ``checkpoints/best``,
            ``checkpoints/last``.
        config: another config with the same parameters, such as a lower capacity; the one it
            was trained with where none is given.
        averaged: the moving average of the parameters where the run kept one.

    Raises:
        UsageError: there is no run or no checkpoint, or the config has other parameters.
        Failure: no checkpoint that the path names is good.
    """
    workdir, steps = find(path)
    run = run_config(workdir)
    like = _parameters(run.model)
    if config is not None and config != run.model:
        _check_same(like, _parameters(config), path)
    item = "ema" if averaged and run.ema else "params"
    for step in reversed(steps):
        try:
            params = read((workdir / "checkpoints" / str(step)).absolute(), **{item: like})[item]
        except Damaged as damage:
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


def find(path: str | Path) -> tuple[Path, list[int]]:
    """The run folder that a path names, and the steps it may mean, oldest first.

    Raises:
        UsageError: there is no run or no checkpoint.
    """
    path = workdir = Path(path)
    word = path.name if path.parent.name == "checkpoints" else ""
    if word:
        workdir = path.parent.parent
    if not (workdir / "config.json").is_file():
        what = "no such folder" if not workdir.exists() else "not a run folder, no config.json"
        raise UsageError(f"{workdir}: {what}; --checkpoint takes a run or its checkpoints/STEP")
    steps = steps_of(workdir)
    if not steps:
        raise UsageError(f"{workdir}: no checkpoint yet; `vmoe train` writes one")
    named = {"": steps, "last": steps[-1:], "best": [best_of(workdir, steps)]}
    if word.isdigit() and int(word) in steps:
        return workdir, [int(word)]
    if named.get(word, [None]) == [None]:
        words = ["last", *(["best"] if named["best"] != [None] else [])]
        known = ", ".join([*map(str, steps), *words])
        raise UsageError(f"{path}: no such checkpoint; there are {known}")
    return workdir, named[word]


def class_names(path: str | Path) -> list[str]:
    """The names of a trained model's classes, in the order of its logits."""
    return run_classes(find(path)[0])


def run_classes(workdir: Path) -> list[str]:
    """The names of the classes that a run folder was made with."""
    return _text(workdir / "classes.txt").splitlines()


def run_config(workdir: Path) -> Train:
    """The config that a run folder was made with.

    Raises:
        UsageError: there is none, or it is damaged.
    """
    try:
        return from_json(Train, _text(workdir / "config.json"))
    except UsageError as error:
        raise UsageError(f"{workdir / 'config.json'}: {error}") from None


def _text(path: Path) -> str:
    try:
        return path.read_text()
    except (OSError, UnicodeDecodeError) as error:
        raise UsageError(f"{path}: cannot be read ({error}); a run folder holds it") from None
