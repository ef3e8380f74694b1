"""Image files to classes, and to the experts that their patches used."""

import dataclasses
import functools
from collections.abc import Sequence
from pathlib import Path

import jax
import numpy as np
from flax import nnx

from vmoe.analysis import capture
from vmoe.analysis.measures import expert_use
from vmoe.axes import Images, Record
from vmoe.config import UsageError
from vmoe.data.images import read_image, to_float
from vmoe.nn.vit import ViT


@dataclasses.dataclass(frozen=True)
class Prediction:
    """What a model makes of one image."""

    path: str
    classes: list[str]
    """The likeliest, first the likeliest."""
    probabilities: list[float]
    """Of those classes, in [0, 1]."""
    experts: dict[int, list[float]]
    """By sparse block: the share of each expert in the image's kept tokens."""


def predict(
    model: ViT, paths: Sequence[str | Path], class_names: Sequence[str], *, top: int = 5
) -> list[Prediction]:
    """Predicts image files, each on its own: no image competes with another for slots.

    Args:
        class_names: in the order of the model's classes.
        top: how many classes to name.

    Raises:
        UsageError: a file is missing or not an image, or nothing is asked for.
    """
    if not paths or top < 1:
        raise UsageError(f"{len(paths)} image files and top={top}: name at least one of each")
    return [_predict(model, path, class_names, top) for path in paths]


def _predict(model: ViT, path: str | Path, class_names: Sequence[str], top: int) -> Prediction:
    images = to_float(read_image(path, model.config.image_size))[None]
    logits, records = _forward(*nnx.split(model), images)
    probabilities = np.asarray(jax.nn.softmax(logits[0]))
    best = np.argsort(-probabilities)[:top]
    return Prediction(
        path=str(path),
        classes=[class_names[i] if i < len(class_names) else f"class {i}" for i in best],
        probabilities=[float(probabilities[i]) for i in best],
        experts={i: expert_use(record, 1)[0].tolist() for i, record in records.items()},
    )


@functools.partial(jax.jit, static_argnums=0)
def _forward(
    graph: nnx.GraphDef, state: nnx.State, images: Images
) -> tuple[jax.Array, dict[int, Record]]:
    return capture(nnx.merge(graph, state), images)
