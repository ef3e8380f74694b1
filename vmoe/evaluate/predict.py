"""Classifies image files, and reports the experts that their tokens used."""

import dataclasses
import glob
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import jax
import numpy as np
from jaxtyping import Array, Float

from vmoe import models
from vmoe.axes import Images
from vmoe.config import RoutingOverrides
from vmoe.config.fields import at_least
from vmoe.data.files import SUFFIXES, image_files_below
from vmoe.data.sources.source import Skipped
from vmoe.errors import UsageError
from vmoe.evaluate.metrics import check_finite
from vmoe.factory import Loaded
from vmoe.nn.losses import likeliest
from vmoe.nn.vit import ViT
from vmoe.routing.load import expert_use

BATCH = 32  # images per forward pass


@dataclasses.dataclass(frozen=True)
class Prediction:
    """The predicted classes of one image, and the experts that it used."""

    path: str
    classes: list[str]
    """The classes with the largest probabilities, in descending order."""
    probabilities: list[float]
    """The probabilities of these classes, in [0, 1]: softmax, or sigmoid if that was the loss."""
    experts: dict[int, list[float]]
    """By sparse block: the fraction of the image's kept choices that go to each expert."""


def image_files(words: Sequence[str | Path]) -> tuple[list[Path], Skipped]:
    """The image files among the given files, folders and patterns.

    Args:
        words: files with any suffix; folders, which are searched for images recursively; or
            patterns (``*``, ``?``, ``[...]``; ``**`` for any depth).

    Returns:
        the files, each once, in the given order; and the files and links skipped in the folders.

    Raises:
        UsageError: a file or folder does not exist, or a folder or pattern contains no image.
    """
    files: list[Path] = []
    skipped = Skipped()
    for word in map(str, words):
        path = Path(word)
        if not path.exists() and (matches := sorted(glob.glob(word, recursive=True))):
            paths = [Path(match) for match in matches]
        elif path.exists():
            paths = [path]
        else:
            raise UsageError(f"{word}: no such file or folder, and no file matches it")
        images: list[Path] = []
        for path in paths:
            if not path.is_dir():
                images.append(path)
                continue
            found, others, links = image_files_below(path)
            images += (Path(image.path) for image in found)
            skipped = Skipped((*skipped.others, *others), (*skipped.links, *links))
        if not images:
            raise UsageError(f"{word}: no images there ({', '.join(SUFFIXES)})")
        files += images
    return list(dict.fromkeys(files)), skipped


def predict(
    loaded: Loaded,
    paths: Sequence[str | Path],
    *,
    top: int = 5,
    on_unreadable: Callable[[UsageError], None] | None = None,
) -> Iterator[Prediction]:
    """Predicts the classes of image files independently: images do not compete for slots.

    Args:
        top: number of classes per prediction.
        on_unreadable: called with the reason for each path that is left out because it is missing
            or not an image; if None, the reason is raised.

    Raises:
        UsageError: a path is missing or not an image, there is no path, ``top`` is below 1, or the
            model has no classes.
        Failure: a logit is NaN or infinite.
    """
    if not paths:
        raise UsageError("no images given: name at least one file, folder or pattern")
    at_least(1).check(top=top)
    model, config = loaded.model, loaded.model.config
    if not config.num_classes:
        raise UsageError(f"{loaded.origin.path}: the model has no classes, only features")
    if config.sparse_blocks:
        config = RoutingOverrides(images_per_group=1).apply(config)
    run = _forward(models.with_params(config, models.params_of(model)))
    names = loaded.class_names
    for start in range(0, len(paths), BATCH):
        batch = _read(loaded, paths[start : start + BATCH], on_unreadable)
        if not batch:
            continue
        images = np.concatenate([image for _, image in batch])
        images = np.pad(images, ((0, min(BATCH, len(paths)) - len(batch)), *[(0, 0)] * 3))
        logits, experts = jax.device_get(run(images))
        for (path, _), own in zip(batch, logits, strict=False):  # the rest is padding
            check_finite(own[None], path)
        best, probabilities = likeliest(logits, top, sigmoid=loaded.sigmoid)
        for i, (path, _) in enumerate(batch):
            yield Prediction(
                path=str(path),
                classes=[names[y] if y < len(names) else f"class {y}" for y in best[i]],
                probabilities=[float(each) for each in probabilities[i]],
                experts={block: use[i].tolist() for block, use in experts.items()},
            )


def _read(
    loaded: Loaded,
    paths: Sequence[str | Path],
    on_unreadable: Callable[[UsageError], None] | None,
) -> list[tuple[str | Path, Float[np.ndarray, "1 h w 3"]]]:
    """The paths that can be read, with their preprocessed images."""
    images = []
    for path in paths:
        try:
            images.append((path, loaded.preprocess([path])))
        except UsageError as error:
            if on_unreadable is None:
                raise
            on_unreadable(error)
    return images


@models.compiled
def _forward(
    model: ViT, images: Images
) -> tuple[Float[Array, "b y"], dict[int, Float[Array, "b e"]]]:
    logits, records = model.forward(images)
    use = {block: expert_use(record, len(images)) for block, record in records.items()}
    return logits, use
