"""Classifies image files, and reports the experts that their tokens used."""

import dataclasses
import glob
import os
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import ClassVar

import numpy as np
from jaxtyping import Array, Float

from vmoe import models, passes
from vmoe.config import RoutingOverrides
from vmoe.data.files import SUFFIXES, image_files_below, read_bytes
from vmoe.data.pipeline import Batch, evaluation_batches
from vmoe.data.reading import Reading
from vmoe.data.sources.source import BaseSource, Example, Skipped
from vmoe.data.workers import IN_THREADS, Workers
from vmoe.errors import UsageError
from vmoe.evaluate.metrics import check_finite
from vmoe.evaluate.sample import require_classes
from vmoe.factory import Loaded
from vmoe.fields import at_least
from vmoe.host.retry import read_regular
from vmoe.nn.inputs import to_float
from vmoe.nn.losses import likeliest
from vmoe.nn.vit import ViT
from vmoe.routing.load import expert_use

BATCH = 32  # images per forward pass of a device


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


@dataclasses.dataclass(frozen=True)
class Files(BaseSource):
    """Image files without labels; see ``Source``."""

    paths: tuple[str, ...]
    name = "files"
    class_names: ClassVar[tuple[str, ...]] = ()
    max_labels = 1

    def __len__(self) -> int:
        return len(self.paths)

    def __getitem__(self, index: int) -> Example:
        path = self.paths[index]
        return Example(read_bytes(path, read_regular), (), path)

    def labels_of(self, index: int) -> tuple[int, ...]:
        return ()


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
    for word in map(os.path.expanduser, map(str, words)):
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
    workers: Workers = IN_THREADS,
    on_unreadable: Callable[[str], None] | None = None,
) -> Iterator[Prediction]:
    """Predicts the classes of image files independently: images do not compete for slots.

    Args:
        top: number of classes per prediction.
        workers: processes that read the images.
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
    require_classes(loaded.origin.path, config)
    if config.sparse_blocks:
        config = RoutingOverrides(images_per_group=1).apply(config)
    placement, how = model.placement, loaded.preprocessing
    program = _forward(models.with_params(config, models.params_of(model), placement=placement))
    names, files = loaded.class_names, Files(tuple(map(str, paths)))
    size = placement.round_up(min(BATCH * placement.devices, len(paths)))
    reading = Reading(size, workers, on_unreadable=on_unreadable)
    batches = evaluation_batches(files, how, reading, shuffled=False)
    start = 0
    for batch, valid, (logits, experts), _ in passes.run(program, batches, placement):
        own = [files.paths[start + i] for i in np.flatnonzero(valid)]
        start += len(batch.valid)
        if not own:
            continue
        for path, values in zip(own, logits, strict=True):
            check_finite(values[None], path)
        best, probabilities = likeliest(logits, top, sigmoid=loaded.sigmoid)
        for i, path in enumerate(own):
            yield Prediction(
                path=path,
                classes=[names[y] if y < len(names) else f"class {y}" for y in best[i]],
                probabilities=[float(each) for each in probabilities[i]],
                experts={block: use[i].tolist() for block, use in experts.items()},
            )


@models.compiled
def _forward(
    model: ViT, batch: Batch
) -> tuple[tuple[Float[Array, "b y"], dict[int, Float[Array, "b e"]]], None]:
    logits, records = model.forward(to_float(batch.images), valid=batch.valid)
    devices = model.placement.devices
    use = {block: expert_use(record, len(logits), devices) for block, record in records.items()}
    return model.placement.replicate((logits, use)), None
