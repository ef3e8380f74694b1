"""Image files to classes, and to the experts that their patches used."""

import dataclasses
import functools
import glob
from collections.abc import Iterator, Sequence
from pathlib import Path

import jax
import numpy as np
from flax import nnx
from jaxtyping import Array, Float

from vmoe import models
from vmoe.analysis import capture
from vmoe.analysis.measures import expert_use
from vmoe.axes import Images
from vmoe.config import EvalConfig
from vmoe.data.crops import resize, to_float
from vmoe.data.decode import SUFFIXES, image_files_below, read_image
from vmoe.errors import UsageError
from vmoe.nn.vit import ViT

BATCH = 32  # images at once


@dataclasses.dataclass(frozen=True)
class Prediction:
    """What a model makes of one image."""

    path: str
    classes: list[str]
    """The likeliest, first the likeliest."""
    probabilities: list[float]
    """Of those classes, in [0, 1]; the softmax."""
    experts: dict[int, list[float]]
    """By sparse block: the share of each expert in the image's kept tokens."""


def image_files(words: Sequence[str | Path]) -> tuple[list[Path], int]:
    """The image files that files, folders and patterns name.

    A folder stands for the images in it and below, a pattern (``*``, ``?``, ``[...]``; ``**`` for
    any depth) for what it matches; a file is taken as it is.

    Returns:
        the files, each once, in the order named; and how many other files in folders were left
        out because their names are not those of images.

    Raises:
        UsageError: a file or folder is not there, or a word stands for no image.
    """
    found: list[Path] = []
    skipped = 0
    for word in map(str, words):
        path = Path(word)
        if not path.exists() and (matches := sorted(glob.glob(word, recursive=True))):
            paths = [Path(match) for match in matches]
        elif path.exists():
            paths = [path]
        else:
            raise UsageError(f"{word}: no such file or folder, and no file matches it")
        images = []
        for path in paths:
            inside, others = image_files_below(path) if path.is_dir() else ([path], 0)
            images += inside
            skipped += others
        if not images:
            raise UsageError(f"{word}: no images there ({', '.join(SUFFIXES)})")
        found += images
    return list(dict.fromkeys(found)), skipped


def predict(
    model: ViT, paths: Sequence[str | Path], class_names: Sequence[str], *, top: int = 5
) -> Iterator[Prediction]:
    """Predicts image files, each on its own: no image competes with another for slots.

    Args:
        class_names: in the order of the model's classes.
        top: how many classes to name.

    Raises:
        UsageError: a file is missing or not an image, or nothing is asked for.
    """
    if not paths or top < 1:
        raise UsageError(f"{len(paths)} image files and top={top}: name at least one of each")
    alone = EvalConfig(images_per_group=1).model(model.config)
    graph, state = nnx.split(
        models.with_params(alone, nnx.to_pure_dict(nnx.state(model, nnx.Param)))
    )
    for start in range(0, len(paths), BATCH):
        some = paths[start : start + BATCH]
        images = to_float(np.stack([resize(read_image(p), model.config.image_size) for p in some]))
        images = np.pad(images, ((0, min(BATCH, len(paths)) - len(some)), *[(0, 0)] * 3))
        probabilities, experts = jax.device_get(_forward(graph, state, images))
        for i, path in enumerate(some):
            best = np.argsort(-probabilities[i])[:top]
            yield Prediction(
                path=str(path),
                classes=[class_names[y] if y < len(class_names) else f"class {y}" for y in best],
                probabilities=[float(probabilities[i, y]) for y in best],
                experts={block: use[i].tolist() for block, use in experts.items()},
            )


@functools.partial(jax.jit, static_argnums=0)
def _forward(
    graph: nnx.GraphDef, state: nnx.State, images: Images
) -> tuple[Float[Array, "b y"], dict[int, Float[Array, "b e"]]]:
    logits, records = capture(nnx.merge(graph, state), images)
    use = {block: expert_use(record, len(images)) for block, record in records.items()}
    return jax.nn.softmax(logits), use
